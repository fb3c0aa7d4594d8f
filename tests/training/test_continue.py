"""A run that continues from a version takes over its structure and weights, and from a checkpoint its optimiser's state."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.directory import TENSORS, read_adapter
from reft_serve.cli.app import app
from reft_serve.errors import AdapterUnsupported, ClientError
from reft_serve.interventions.positions import PositionRule
from reft_serve.training.loop.run import fresh_because, train
from reft_serve.training.model.adapter import build
from reft_serve.training.model.parent import Parent, read_parent
from reft_serve.training.plan import AdapterPlan, LoraPlan, Plan
from tests.support.paths import GOLDEN
from tests.support.training.runs import examples

BASE = GOLDEN / "models" / "tiny-llama"
# Dropout draws from the random generator in every step, so a wrong state of it shows in the weights.
PLAN = Plan(
    adapter=AdapterPlan("loreft", 2, None, PositionRule("f2+l2", tied=False), dropout=0.2),
    max_steps=25,
    batch=3,
    learning_rate=1e-2,
    schedule="constant",
    warmup=0.0,
    save_every=25,
)
DATA = examples(22)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first") / "run"
    train(BASE, PLAN, DATA, out, plot=False)
    return out


@pytest.fixture(scope="module")
def checkpoint(first: Path) -> Parent:
    return read_parent(first / "checkpoints" / "checkpoint-25")


def test_two_runs_of_25_steps_are_one_of_50_bit_for_bit(
    first: Path, checkpoint: Parent, tmp_path: Path
) -> None:
    outcome = train(BASE, PLAN, DATA, tmp_path / "second", plot=False, parent=checkpoint)
    train(BASE, replace(PLAN, max_steps=50), DATA, tmp_path / "whole", plot=False)
    made, whole = (tmp_path / name / "adapter" / TENSORS for name in ("second", "whole"))
    assert outcome.step == 50
    assert made.read_bytes() == whole.read_bytes()
    assert made.read_bytes() != (first / "adapter" / TENSORS).read_bytes()
    for name in ("parameters.safetensors",):
        ends = [
            tmp_path / run / "checkpoints" / "checkpoint-50" / name for run in ("second", "whole")
        ]
        assert ends[0].read_bytes() == ends[1].read_bytes()
    provenance = read_adapter(tmp_path / "second" / "adapter").manifest.provenance
    assert provenance["parent"] == "checkpoint-25"
    assert provenance["parent_sha256"] == checkpoint.adapter.digest
    assert provenance["parent_step"] == 25


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schedule": "linear"}, "a linear schedule starts again"),
        ({"learning_rate": 1e-3}, "learning_rate differ from the checkpoint's run"),
        ({"seed": 1, "batch": 4}, "batch, seed differ from the checkpoint's run"),
        ({"epochs": 9.0, "keep": None}, None),
    ],
)
def test_another_run_has_a_new_optimiser_for_a_reason(
    checkpoint: Parent, change: dict[str, object], reason: str | None
) -> None:
    assert fresh_because(checkpoint, replace(PLAN, **change), DATA) == reason  # type: ignore[arg-type]


def test_a_version_and_other_data_have_a_new_optimiser(first: Path, checkpoint: Parent) -> None:
    assert (
        fresh_because(read_parent(first), PLAN, DATA)
        == "a version holds weights and no training state"
    )
    assert fresh_because(checkpoint, PLAN, DATA[1:]) == "the data differ from the checkpoint's run"


@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft"])
def test_a_version_of_every_kind_begins_with_its_bits(kind: str, tmp_path: Path) -> None:
    lora = LoraPlan(4, 8.0, targets=("q_proj", "v_proj"))
    shape = AdapterPlan(kind, 3, (0, 2), PositionRule("l1"))  # type: ignore[arg-type]
    plan = replace(PLAN, adapter=shape, lora=lora, max_steps=2, save_every=2, schedule="linear")
    train(BASE, plan, DATA, tmp_path / "run", plot=False)
    parent = read_parent(tmp_path / "run", "ft:base:acme:a:1")
    own = parent.plan(Plan(seed=9))
    assert own.adapter == shape
    assert own.lora == lora
    model = build(BASE, own, parent)
    for edit, weights in zip(model.edits, parent.adapter.weights, strict=True):
        for name, tensor in edit.module.weights().tensors().items():
            assert torch.equal(tensor, weights.tensors()[name]), name
    assert any(p.requires_grad for n, p in model.lm.named_parameters() if "lora_A" in n)
    outcome = train(
        BASE, replace(own, max_steps=1), DATA, tmp_path / "next", plot=False, parent=parent
    )
    assert outcome.step == 1
    made = read_adapter(tmp_path / "next" / "adapter")
    assert made.manifest.provenance["parent"] == "ft:base:acme:a:1"
    assert made.lora is not None


def test_changes_of_structure_are_refused_by_name(checkpoint: Parent) -> None:
    asked = {"rank": 8, "positions": "f2+l2", "kind": "direft", "layers": [0], "lora_rank": 4}
    with pytest.raises(ClientError) as refused:
        checkpoint.check(asked, read_base_model(BASE))
    for name in ("rank is 2", "kind is loreft", "layers is", "lora_rank is 0"):
        assert name in str(refused.value)
    assert "positions" not in str(refused.value)


def test_a_version_of_another_base_is_refused(checkpoint: Parent) -> None:
    other = read_base_model(BASE).model_copy(update={"hidden_size": 8})
    with pytest.raises(AdapterUnsupported, match="hidden size"):
        checkpoint.check({}, other)


def test_the_command_line_continues_and_says_how(tmp_path: Path) -> None:
    rows = [{"prompt": f"word {n}", "completion": f" more {n}"} for n in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        "train",
        str(data),
        "--base",
        str(BASE),
        "--max-steps",
        "2",
        "--schedule",
        "constant",
        "--warmup",
        "0",
    ]
    runner = CliRunner()
    begun = runner.invoke(
        app, [*common, "--out", str(tmp_path / "one"), "--rank", "2", "--save-every", "2"]
    )
    assert begun.exit_code == 0, begun.output
    where = str(tmp_path / "one" / "checkpoints" / "checkpoint-2")
    wrong = runner.invoke(
        app, [*common, "--out", str(tmp_path / "two"), "--from", where, "--rank", "3"]
    )
    assert wrong.exit_code == 1
    assert "rank is 2 in the model to continue from and cannot become 3" in wrong.output
    more = runner.invoke(app, [*common, "--out", str(tmp_path / "two"), "--from", where])
    assert more.exit_code == 0, more.output
    assert "continues from checkpoint-2 after step 2, with the optimiser's state" in more.output
    provenance = read_adapter(tmp_path / "two" / "adapter").manifest.provenance
    assert len(str(provenance["data_sha256"])) == 64
    assert provenance["adapter.rank"] == 2
