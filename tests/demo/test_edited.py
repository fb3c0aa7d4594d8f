"""Training and sampling with edits on the demo model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from reft_serve.adapters.directory import read_adapter
from reft_serve.demo import train
from reft_serve.demo.behaviours import ADAPTERS, BEHAVIOURS, MODEL
from reft_serve.demo.edited import Edit, EditedModel, Edits
from reft_serve.interventions.modules import Intervention
from reft_serve.interventions.positions import Part, PositionRule

PROMPTS = (
    "Once upon a time, there was a girl.",
    "Tom went out.",
    "One day, a boy and his mom went to the big park.",
)
PART = {"both": Part.PREFIX, "prefix": Part.PREFIX, "suffix": Part.SUFFIX}


@pytest.fixture(scope="module")
def model() -> EditedModel:
    return EditedModel(MODEL)


def shipped(name: str) -> Edits:
    adapter = read_adapter(ADAPTERS / name)
    pairs = zip(adapter.manifest.interventions, adapter.weights, strict=True)
    edits = tuple(
        Edit(spec.layer, PART[spec.part], Intervention.of(weights)) for spec, weights in pairs
    )
    return Edits(edits, adapter.manifest.positions)


def greedy(model: EditedModel, prompts: Sequence[str], adapter: Edits | None) -> list[str]:
    answers = model.sample([model.tokens(p, prompt=True) for p in prompts], 24, 0, 1e-4, adapter)
    return [model.text(answer) for answer in answers]


def test_a_mask_holds_the_rules_tokens_on_either_side_of_the_padding() -> None:
    adapter = Edits((), PositionRule("f2+l1", tied=False))
    right = adapter.mask([4, 6], [7, 6]).int().tolist()
    assert right == [
        [[1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]],
        [[0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0]],
    ]
    left = adapter.mask([4, 6], [4, 6], left=True).int().tolist()
    assert left == [
        [[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1]],
    ]


def test_a_mask_goes_on_into_the_answer_where_generated_tokens_are_edited() -> None:
    assert Edits((), PositionRule("l1", phase="all")).mask([3], [6])[0].int().tolist() == [
        [0, 0, 1, 1, 1, 1]
    ]


def test_without_an_adapter_the_model_is_the_base(model: EditedModel) -> None:
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = torch.tensor([model.tokens(PROMPTS[0], prompt=True)])
    expected = plain.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    greedy(model, PROMPTS, shipped("birds"))  # leaves nothing behind
    assert greedy(model, PROMPTS[:1], None) == [model.text(expected.tolist())]


@pytest.mark.parametrize("name", [behaviour.name for behaviour in BEHAVIOURS])
def test_an_answer_does_not_depend_on_the_padding_beside_it(model: EditedModel, name: str) -> None:
    adapter = shipped(name)
    together = greedy(model, PROMPTS, adapter)
    assert together == [greedy(model, [prompt], adapter)[0] for prompt in PROMPTS]
    assert together != greedy(model, PROMPTS, None)


def test_a_loss_counts_the_answer_only_and_sees_the_edits(model: EditedModel) -> None:
    row = (model.tokens(PROMPTS[0], prompt=True), model.tokens(' "Look!" she said.'))
    longer = (row[0] + row[0][1:], row[1])
    base = Edits((), PositionRule("l1"))
    ids = torch.tensor([row[0] + row[1]])
    logits = model.lm(ids).logits[0, len(row[0]) - 1 : -1]
    by_hand = torch.nn.functional.cross_entropy(logits, torch.tensor(row[1]))
    torch.testing.assert_close(model.loss(base, [row]), by_hand)
    both = (model.loss(base, [row]) + model.loss(base, [longer])) / 2
    torch.testing.assert_close(model.loss(base, [row, longer]), both)
    assert model.loss(shipped("speech"), [row]) < model.loss(base, [row]) - 1


@pytest.mark.slow
def test_training_again_gives_an_adapter_as_good_as_the_shipped_one(tmp_path: Path) -> None:
    train.main(["speech", "--out", str(tmp_path)])
    again, ours = (read_adapter(place / "speech").manifest for place in (tmp_path, ADAPTERS))
    assert again.model_dump(exclude={"provenance"}) == ours.model_dump(exclude={"provenance"})
    rates = [manifest.provenance["rate"] for manifest in (again, ours)]
    assert all(isinstance(rate, float) and rate > 0.9 for rate in rates)


def test_training_refuses_to_write_over_an_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["speech"])
    assert "already exists" in capsys.readouterr().err
