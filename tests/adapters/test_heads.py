"""Classifier heads on disk: written, read, imported from pyreft, and refused where they are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reft_serve.adapters.directory import CONFIG, TENSORS, publish, read_adapter
from reft_serve.adapters.head import HeadSpec
from reft_serve.adapters.importers.detection import import_adapter, read_any
from reft_serve.adapters.importers.pyreft_head import read_head
from reft_serve.adapters.inheritance import structure_of
from reft_serve.adapters.manifest import InterventionSpec, Manifest
from reft_serve.adapters.structure import check_structure
from reft_serve.errors import AdapterInvalid, AdapterUnsupported
from reft_serve.interventions.heads import Head, scores_of
from reft_serve.interventions.kinds import Weights
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import ACTIVATION_CODES
from tests.support.adapters.saves import named

BASE = named("loreft_l1").base
WIDTH = BASE.hidden_size
SPEC = HeadSpec(
    problem_type="single_label_classification",
    labels=("no", "yes", "perhaps"),
    reads="first",
    activation="tanh",
)


def tensors(width: int = WIDTH, outputs: int = 3) -> dict[str, Tensor]:
    return {
        "dense.weight": torch.randn(width, width), "dense.bias": torch.randn(width),
        "out.weight": torch.randn(outputs, width), "out.bias": torch.randn(outputs),
    }  # fmt: skip


def manifest(spec: HeadSpec | None = SPEC) -> Manifest:
    where = InterventionSpec(layer=1, component="block_output", kind="loreft", rank=2)
    return Manifest(
        base_model=BASE, interventions=(where,), positions=PositionRule("f1"), head=spec
    )


def weights() -> list[Weights]:
    R = torch.linalg.qr(torch.randn(WIDTH, 2))[0].mT.contiguous()
    return [Weights.of("loreft", {"R": R, "W": torch.randn(2, WIDTH), "b": torch.randn(2)})]


def written(path: Path) -> Path:
    publish(path, manifest(), weights(), head=Head.of(tensors(), ACTIVATION_CODES["tanh"]))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    held = tensors()
    made = publish(
        tmp_path / "a", manifest(), weights(), head=Head.of(held, ACTIVATION_CODES["tanh"])
    )
    found = read_adapter(tmp_path / "a")
    assert found.digest == made.digest
    assert found.manifest.head == SPEC
    assert found.head is not None
    assert all(torch.equal(tensor, held[name]) for name, tensor in found.head.tensors().items())
    assert check_structure(tmp_path / "a", "a").head == SPEC
    h = torch.randn(4, WIDTH)
    by_hand = (
        torch.tanh(h @ held["dense.weight"].T + held["dense.bias"]) @ held["out.weight"].T
        + held["out.bias"]
    )
    torch.testing.assert_close(found.head.logits(h), by_hand)
    torch.testing.assert_close(scores_of(by_hand, SPEC.problem_type).sum(1), torch.ones(4))
    assert found.manifest.summary()["labels"] == ["no", "yes", "perhaps"]


def test_no_run_continues_from_a_version_with_a_head(tmp_path: Path) -> None:
    with pytest.raises(AdapterUnsupported, match="it has a classifier head"):
        structure_of(written(tmp_path / "a"), "a")


def test_adapters_without_a_head_are_the_bytes_they_were(tmp_path: Path) -> None:
    publish(tmp_path / "a", manifest(None), weights())
    assert "head" not in json.loads((tmp_path / "a" / CONFIG).read_text())
    assert "head" not in manifest(None).to_json()


def _spec(**changed: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, _: config["head"].update(changed)


def _tensor(
    name: str, change: Callable[[Tensor], Tensor]
) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda _, held: held.update({name: change(held[name])})


def _without(name: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def remove(_: dict[str, Any], held: dict[str, Tensor]) -> None:
        del held[name]

    return remove


DAMAGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], None], str]] = {
    "too narrow": (_tensor("head.out.weight", lambda t: t[:, 1:].clone()), r"has shape \(3, 63\) and must have \(3, 64\)"),
    "a label more": (_spec(labels=["no", "yes", "perhaps", "never"]), r"must have \(4, 64\), for 4 labels"),
    "no labels": (_spec(labels=[]), r"head\.labels: .*at least 1 item"),
    "labels missing": (lambda config, _: config["head"].pop("labels") and None, r"head\.labels: Field required"),
    "a label twice": (_spec(labels=["no", "yes", "no"]), "the label 'no' appears twice"),
    "a number for a label": (_spec(labels=["no", "yes", 3]), r"head\.labels\.2"),
    "one label": (_spec(labels=["yes"]), "needs at least two labels"),
    "very many labels": (_spec(labels=[f"{k}" for k in range(5000)]), "it has 5,000 entries and at most 4,096"),
    "NaN": (_tensor("head.out.weight", lambda t: torch.full_like(t, float("nan"))), r"head\.out\.weight holds NaN"),
    "infinite bias": (_tensor("head.out.bias", lambda t: t + float("inf")), r"head\.out\.bias holds NaN or Inf"),
    "half precision": (_tensor("head.out.weight", lambda t: t.half()), "is float16 and must be float32"),
    "no dense layer": (_without("head.dense.weight"), r"head\.dense\.weight is missing"),
    "a dense layer too many": (_spec(activation=None), "does not belong to this head"),
    "no output": (_without("head.out.weight"), r"head\.out\.weight is missing"),
    "no head said": (lambda config, _: config.pop("head") and None, "but reft_config.json has none"),
    "reads the second": (_spec(reads="second"), r"head\.reads"),
    "another problem": (_spec(problem_type="ranking"), r"head\.problem_type"),
    "an unknown activation": (_spec(activation="sine"), "activation 'sine' is not one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_head_is_named(name: str, tmp_path: Path) -> None:
    damage, told = DAMAGES[name]
    path = written(tmp_path / "a")
    config, held = json.loads((path / CONFIG).read_text()), load_file(path / TENSORS)
    damage(config, held)
    (path / CONFIG).write_text(json.dumps(config))
    save_file(held, path / TENSORS)
    with pytest.raises(AdapterInvalid, match=told):
        read_adapter(path)
    if "NaN" not in told:
        with pytest.raises(AdapterInvalid, match=told):
            check_structure(path, "a")


def test_pyrefts_classifier_comes_in_with_its_head(tmp_path: Path) -> None:
    save = named("loreft_cls")
    imported = read_any(save.path, save.base, save.flags)
    spec = imported.manifest.head
    assert spec is not None
    assert (spec.problem_type, spec.labels) == (
        "single_label_classification",
        ("LABEL_0", "LABEL_1", "LABEL_2"),
    )
    assert (spec.reads, spec.activation) == ("last", None)
    saved = torch.load(save.path / "pytorch_model.bin", weights_only=True)
    assert imported.head is not None
    assert torch.equal(imported.head.out, saved["score.weight"].float())
    made = import_adapter(
        save.path, save.base, tmp_path / "a", replace(save.flags, labels="no, yes, perhaps")
    )
    assert read_adapter(tmp_path / "a").digest == made.digest
    assert made.manifest.head is not None
    assert made.manifest.head.labels == ("no", "yes", "perhaps")


FORMS = {
    "roberta": (("classifier.dense", "classifier.out_proj"), ("first", "tanh")),
    "distilbert": (("pre_classifier", "classifier"), ("first", "relu")),
    "bert": (("bert.pooler.dense", "classifier"), ("first", "tanh")),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_heads_of_encoders_are_known(form: str) -> None:
    (dense, out), expected = FORMS[form]
    saved = {
        f"{dense}.weight": torch.randn(8, 8), f"{dense}.bias": torch.randn(8), f"{out}.weight": torch.randn(2, 8),
        f"{out}.bias": torch.randn(2),
    }  # fmt: skip
    faults: list[str] = []
    found = read_head(saved, (), None, faults)
    assert found is not None
    assert not faults
    spec, head = found
    assert (spec.reads, spec.activation) == expected
    assert torch.equal(head.out, saved[f"{out}.weight"])
    assert head.dense is not None
    assert torch.equal(head.dense, saved[f"{dense}.weight"])


def test_a_head_whose_pooler_is_in_the_base_is_refused() -> None:
    faults: list[str] = []
    assert (
        read_head(
            {"classifier.weight": torch.ones(2, 8), "classifier.bias": torch.ones(2)},
            (),
            None,
            faults,
        )
        is None
    )
    assert "is incomplete" in faults[0]
