"""Saves of AdapterHub's `adapters`: the same edit as its ReFT unit makes, at the same tokens, or a
sentence.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.importers.common import Imported, ImportFlags
from reft_serve.adapters.importers.detection import read_any
from reft_serve.errors import AdapterInvalid, AdapterUnsupported, ClientError, ImportFlagMissing
from reft_serve.interventions.kinds import edit
from tests.support.adapters.saves import LLAMA

BASE = read_base_model(LLAMA)
CONFIG: dict[str, Any] = {
    **{
        "architecture": "reft",
        "layers": [0, 2],
        "prefix_positions": 3,
        "suffix_positions": 2,
        "r": 4,
    },
    **{
        "orthogonality": True,
        "tied_weights": True,
        "dropout": 0.05,
        "non_linearity": None,
        "output_reft": True,
    },
}


class Unit(nn.Module):
    """The forward of one unit as the library's documentation states it."""

    def __init__(self, orthogonality: bool, subtract: bool, activation: nn.Module) -> None:
        super().__init__()
        self.learned_source = nn.Linear(64, 4)
        projection = nn.Linear(64, 4, bias=False)
        self.projection = orthogonal(projection) if orthogonality else projection
        if orthogonality:
            with torch.no_grad():
                projection.parametrizations.weight.original += 0.3 * torch.randn(4, 64).triu(1)
        self.subtract, self.activation = subtract, activation

    def forward(self, h: Tensor) -> Tensor:
        source = self.activation(self.learned_source(h))
        if self.subtract:
            source = source - self.projection(h)
        return h + source @ self.projection.weight


def write(
    path: Path,
    units: dict[tuple[int, int], Unit],
    safetensors: bool = False,
    stem: str = "model.layers",
    **changes: Any,
) -> Path:
    path.mkdir(exist_ok=True)
    whole = {
        "model_type": "llama",
        "hidden_size": 64,
        "name": "mine",
        "config": {**CONFIG, **changes},
    }
    (path / "adapter_config.json").write_text(json.dumps(whole))
    held = {
        f"{stem}.{layer}.reft_layer.refts.mine.units.{number}.{name}": tensor.contiguous()
        for (layer, number), unit in units.items()
        for name, tensor in unit.state_dict().items()
    }
    if safetensors:
        save_file(held, path / "adapter.safetensors")
    else:
        torch.save(held, path / "pytorch_adapter.bin")
    return path


def tied_units(
    orthogonality: bool = True, subtract: bool = True, activation: nn.Module | None = None
) -> dict[Any, Unit]:
    return {
        (layer, 0): Unit(orthogonality, subtract, activation or nn.Identity()) for layer in (0, 2)
    }


def bring_in(path: Path, **flags: Any) -> Imported:
    return read_any(path, BASE, replace(ImportFlags(), **flags))


@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize(
    "activation", [(None, nn.Identity()), ("ReLU", nn.ReLU()), ("leakyrelu", nn.LeakyReLU())]
)
@pytest.mark.parametrize(
    ("orthogonality", "subtract", "kind"),
    [
        (True, True, "loreft"),
        (False, True, "noreft"),
        (False, False, "nodireft"),
        (True, False, "direft"),
    ],
)
def test_an_import_edits_as_the_library_does(
    tmp_path: Path,
    orthogonality: bool,
    subtract: bool,
    kind: str,
    activation: tuple[str, nn.Module],
    safetensors: bool,
) -> None:
    units = tied_units(orthogonality, subtract, activation[1])
    path = write(
        tmp_path / "a", units, safetensors, orthogonality=orthogonality, non_linearity=activation[0]
    )
    imported = bring_in(path, kind=kind)
    assert [(s.layer, s.component, s.kind) for s in imported.manifest.interventions] == [
        (0, "block_output", kind),
        (2, "block_output", kind),
    ]
    h = torch.randn(5, 64)
    for weights, unit in zip(imported.weights, units.values(), strict=True):
        torch.testing.assert_close(edit(h, weights), unit(h).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stem", ["transformer.h", "layers", "base_model.model.model.layers"])
def test_layers_are_found_whatever_the_model_calls_them(tmp_path: Path, stem: str) -> None:
    imported = bring_in(write(tmp_path / "a", tied_units(), stem=stem))
    assert [spec.layer for spec in imported.manifest.interventions] == [0, 2]


@pytest.mark.parametrize(("first", "last"), [(3, 0), (0, 2), (3, 2), (1, 1)])
def test_tied_positions_are_exactly_the_librarys_even_in_short_prompts(
    tmp_path: Path, first: int, last: int
) -> None:
    path = write(tmp_path / "a", tied_units(), prefix_positions=first, suffix_positions=last)
    rule = bring_in(path).manifest.positions
    for length in range(max(first, last), 12):
        expected = {*range(first), *range(length - last, length)}
        assert rule.indices(length) == (sorted(expected), [])


def test_untied_units_serve_the_prefix_and_the_suffix_and_short_prompts_are_warned_of(
    tmp_path: Path,
) -> None:
    units = {
        (layer, number): Unit(True, True, nn.Identity()) for layer in (0, 2) for number in (0, 1)
    }
    imported = bring_in(write(tmp_path / "a", units, tied_weights=False))
    assert [(s.layer, s.part) for s in imported.manifest.interventions] == [
        (0, "prefix"),
        (0, "suffix"),
        (2, "prefix"),
        (2, "suffix"),
    ]
    assert imported.manifest.positions.indices(10) == ([0, 1, 2], [8, 9])
    assert any("fewer than 6 tokens" in warning for warning in imported.warnings)
    h = torch.randn(3, 64)
    for weights, unit in zip(imported.weights, units.values(), strict=True):
        torch.testing.assert_close(edit(h, weights), unit(h).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("first", "last", "used"), [(3, 0, 0), (0, 2, 1)])
def test_the_unit_of_a_half_that_does_not_exist_is_left_out(
    tmp_path: Path, first: int, last: int, used: int
) -> None:
    units = {
        (layer, number): Unit(True, True, nn.Identity()) for layer in (0, 2) for number in (0, 1)
    }
    path = write(
        tmp_path / "a", units, tied_weights=False, prefix_positions=first, suffix_positions=last
    )
    imported = bring_in(path)
    assert len(imported.weights) == 2
    assert torch.equal(imported.weights[0].tensors()["W"], units[0, used].learned_source.weight)


def test_generated_tokens_are_warned_of(tmp_path: Path) -> None:
    assert any(
        "generated tokens" in warning
        for warning in bring_in(write(tmp_path / "a", tied_units())).warnings
    )


def test_whether_the_projection_is_subtracted_is_asked_for_where_it_is_not_recorded(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a", tied_units(False), orthogonality=False)
    with pytest.raises(ImportFlagMissing, match=r"--kind noreft .* --kind nodireft"):
        bring_in(path)
    recorded = write(
        tmp_path / "b", tied_units(False), orthogonality=False, subtract_projection=False
    )
    assert {spec.kind for spec in bring_in(recorded).manifest.interventions} == {"nodireft"}


@pytest.mark.parametrize(
    ("changes", "error", "phrase"),
    [
        ({"architecture": "lora"}, AdapterUnsupported, "its architecture is 'lora'"),
        ({"architecture": "union"}, AdapterUnsupported, "its architecture is 'union'"),
        ({"non_linearity": "prelu"}, AdapterUnsupported, "'prelu' is not supported"),
        ({"prefix_positions": -1}, AdapterInvalid, "config.prefix_positions"),
        ({"prefix_positions": "3"}, AdapterInvalid, "config.prefix_positions"),
        ({"prefix_positions": 0, "suffix_positions": 0}, AdapterInvalid, "edits nothing"),
        ({"layers": [0, 1, 2]}, AdapterInvalid, r"names layers \[0, 1, 2\]"),
        ({"layers": "some"}, AdapterInvalid, "config.layers"),
        ({"tied_weights": False}, AdapterInvalid, "needs 2 units"),
        ({"orthogonality": False, "subtract_projection": True}, AdapterInvalid, "is parametrised"),
    ],
)
def test_what_cannot_be_imported_gets_a_sentence(
    tmp_path: Path, changes: dict[str, Any], error: type[ClientError], phrase: str
) -> None:
    with pytest.raises(error, match=phrase):
        bring_in(write(tmp_path / "a", tied_units(), **changes))


@pytest.mark.parametrize("flags", [{"positions": "f3"}, {"untied": True}, {"last_offset": 1}])
def test_positions_are_not_said_twice(tmp_path: Path, flags: dict[str, Any]) -> None:
    with pytest.raises(ClientError, match="records the positions"):
        bring_in(write(tmp_path / "a", tied_units()), **flags)


@pytest.mark.parametrize(
    ("flags", "phrase"), [({"kind": "noreft"}, "--kind noreft"), ({"activation": "tanh"}, "linear")]
)
def test_flags_that_contradict_the_save_are_faults(
    tmp_path: Path, flags: dict[str, Any], phrase: str
) -> None:
    with pytest.raises(AdapterInvalid, match=phrase):
        bring_in(write(tmp_path / "a", tied_units()), **flags)


def test_a_lora_of_peft_is_not_taken_for_a_reft(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    with pytest.raises(AdapterUnsupported, match="a PEFT LoRA needs no import"):
        bring_in(tmp_path)


@pytest.mark.parametrize(("head", "refused"), [("classification", True), ("causal_lm", False)])
def test_a_prediction_head_is_refused_unless_it_is_the_language_models(
    tmp_path: Path, head: str, refused: bool
) -> None:
    path = write(tmp_path / "a", tied_units())
    (path / "head_config.json").write_text(json.dumps({"config": {"head_type": head}}))
    if refused:
        with pytest.raises(AdapterUnsupported, match="classification prediction head"):
            bring_in(path)
    else:
        assert bring_in(path).weights


@pytest.mark.parametrize(
    ("key", "phrase"),
    [
        ("score.weight", "'score.weight'"),
        ("model.layers.0.reft_layer.refts.other.units.0.learned_source.bias", "several adapters"),
        ("model.layers.0.reft_layer.refts.mine.units.0.gate", "'gate'"),
        ("model.layers.0.reft_layer.refts.mine.units.1.gate", "needs 1 units"),
    ],
)
def test_tensors_that_belong_nowhere_are_faults(tmp_path: Path, key: str, phrase: str) -> None:
    path = write(tmp_path / "a", tied_units())
    held = torch.load(path / "pytorch_adapter.bin", weights_only=True)
    torch.save({**held, key: torch.zeros(4)}, path / "pytorch_adapter.bin")
    with pytest.raises(AdapterInvalid, match=phrase):
        bring_in(path)


def test_a_missing_weight_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a", tied_units())
    (path / "pytorch_adapter.bin").unlink()
    with pytest.raises(AdapterInvalid, match=r"pytorch_adapter.bin is missing"):
        bring_in(path)
