"""A save whose interventions only add a vector is a lobireft of rank 1 that adds the same vector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.importers.common import Imported, ImportFlags
from reft_serve.adapters.importers.detection import import_adapter, read_any
from reft_serve.adapters.manifest import BaseFacts
from reft_serve.errors import AdapterInvalid, AdapterUnsupported
from reft_serve.interventions.kinds import edit
from tests.support.adapters.saves import LLAMA, named

KEY = "intkey_layer_3_comp_block_output_unit_pos_nunit_1#0"
VECTOR = torch.randn(64, generator=torch.Generator().manual_seed(1))
SIZES = {"embed_dim": torch.tensor(64), "interchange_dim": torch.tensor(64)}
SOURCED = [None] * 7 + [True, None]


@pytest.fixture(scope="module")
def base() -> BaseFacts:
    return read_base_model(LLAMA)


def written(
    folder: Path, state: dict[str, Tensor], cls: str, tail: list[Any] | None = None
) -> Path:
    """A `ReftModel.save` directory of one intervention at layer 3."""
    folder.mkdir()
    torch.save(state, folder / f"{KEY}.bin")
    key = KEY.removeprefix("intkey_")
    config = {
        "mode": "parallel", "intervention_types": [f"<class '{cls}'>"], "sorted_keys": [key],
        "representations": [[3, "block_output", "pos", 1, None, *(tail or [None] * 9)]],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def bring_in(path: Path, base: BaseFacts, kind: str | None = None) -> Imported:
    return read_any(path, base, ImportFlags(positions="all", kind=kind))


ADDING = {
    "a bias of one's own": ({"bias": VECTOR}, "__main__.BiasIntervention", None, None, 1),
    "in bfloat16": ({"bias": VECTOR.bfloat16()}, "pyreft.BiasIntervention", None, None, 1),
    "pyvene's addition": ({"source_representation": VECTOR[None], **SIZES},
                          "pyvene.models.interventions.AdditionIntervention", SOURCED, None, 1),
    "pyvene's subtraction": ({"source_representation": VECTOR, **SIZES},
                             "pyvene.models.interventions.SubtractionIntervention", SOURCED, None, -1),
    "a class that the user answers for": ({"steer": VECTOR}, "mine.Shift", None, "lobireft", 1),
}  # fmt: skip


@pytest.mark.parametrize("case", ADDING)
def test_a_save_that_adds_a_vector_is_a_lobireft_that_adds_it(
    tmp_path: Path, base: BaseFacts, case: str
) -> None:
    state, cls, tail, kind, sign = ADDING[case]
    imported = bring_in(written(tmp_path / "save", state, cls, tail), base, kind)
    (spec,) = imported.manifest.interventions
    assert (spec.layer, spec.component, spec.kind, spec.rank) == (3, "block_output", "lobireft", 1)
    hidden = torch.randn(5, 64)
    expected = hidden + sign * next(iter(state.values())).float().flatten()
    torch.testing.assert_close(edit(hidden, imported.weights[0]), expected, rtol=0, atol=1e-6)
    made = import_adapter(
        tmp_path / "save", base, tmp_path / "made", ImportFlags(positions="all", kind=kind)
    )
    assert made.digest


def test_a_checkpoint_without_a_configuration_is_read_with_its_kind(
    tmp_path: Path, base: BaseFacts
) -> None:
    path = written(tmp_path / "save", {"bias": VECTOR}, "x")
    (path / "config.json").unlink()
    imported = bring_in(path, base, "lobireft")
    torch.testing.assert_close(
        edit(torch.zeros(1, 64), imported.weights[0])[0], VECTOR, rtol=0, atol=1e-6
    )


def test_a_lobireft_of_pyrefts_own_stays_what_it_is() -> None:
    save = named("lobireft_l1")
    assert read_any(save.path, save.base, save.flags).manifest.interventions[0].rank > 1


@pytest.mark.parametrize(
    ("state", "phrase"),
    [
        ({"bias": torch.zeros(64)}, "adds a vector of zeros"),
        ({"bias": torch.full((64,), torch.nan)}, "must hold one vector of finite floats"),
        ({"bias": torch.ones(64, dtype=torch.int64)}, "must hold one vector of finite floats"),
        ({"bias": torch.ones(2, 64)}, r"holds \(2, 64\)"),
        ({"bias": torch.ones(63)}, r"must have \(1, 64\)"),
        ({"bias": torch.tensor(1.0)}, "must hold one vector"),
        ({"bias": VECTOR, "scale": torch.ones(1)}, "holds 'scale'"),
        (
            {"bias": VECTOR} | SIZES | {"interchange_dim": torch.tensor(32)},
            "changes 32 of 64 dimensions",
        ),
    ],
)
def test_what_is_no_vector_is_told(
    tmp_path: Path, base: BaseFacts, state: dict[str, Tensor], phrase: str
) -> None:
    with pytest.raises(AdapterInvalid, match=phrase):
        bring_in(written(tmp_path / "save", state, "__main__.BiasIntervention"), base)


def test_an_unknown_class_is_refused_with_what_to_do(tmp_path: Path, base: BaseFacts) -> None:
    with pytest.raises(
        AdapterUnsupported, match="If all that it does is add one vector, give --kind lobireft"
    ):
        bring_in(written(tmp_path / "save", {"steer": VECTOR}, "mine.Shift"), base)


def test_a_save_whose_sorted_keys_name_its_files_is_read_too(
    tmp_path: Path, base: BaseFacts
) -> None:
    path = written(tmp_path / "save", {"bias": VECTOR}, "__main__.BiasIntervention")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"sorted_keys": [KEY]}))
    assert bring_in(path, base).manifest.interventions[0].kind == "lobireft"
