"""What we export is laid out as real pyreft lays it out, and comes back as it was."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from torch.nn.utils.parametrizations import orthogonal

from reft_serve.adapters.directory import Adapter, publish, read_adapter
from reft_serve.adapters.importers.detection import import_adapter, read_any
from reft_serve.adapters.importers.pyreft_export import export_pyreft, import_flags
from reft_serve.errors import AdapterExists, AdapterUnsupported
from reft_serve.interventions.positions import PositionRule
from tests.support.adapters.saves import IMPORTABLE, Save, named
from tests.support.paths import GOLDEN


def brought_in(save: Save, to: Path) -> Adapter:
    return import_adapter(save.path, save.base, to / "adapter", save.flags)


@pytest.mark.parametrize("save", IMPORTABLE, ids=lambda save: save.name)
def test_export_then_import_gives_back_the_adapter(save: Save, tmp_path: Path) -> None:
    adapter = brought_in(save, tmp_path)
    export_pyreft(adapter, tmp_path / "exported")
    again = read_any(tmp_path / "exported", save.base, save.flags)
    assert again.manifest.interventions == adapter.manifest.interventions
    for ours, theirs in zip(again.weights, adapter.weights, strict=True):
        for name, tensor in theirs.tensors().items():
            returned = ours.tensors()[name]
            assert returned.dtype == tensor.dtype
            torch.testing.assert_close(returned, tensor, rtol=0, atol=1e-6 if name == "R" else 0)


@pytest.mark.parametrize(
    "case",
    [
        "loreft_f5l5",
        "direft_f5l5",
        "noreft_f5l5",
        "noreft_nobias_l1",
        "consreft_f5l5",
        "lobireft_l1",
        "nodireft_l1",
    ],
)
def test_an_export_has_the_files_keys_and_configuration_of_pyreft(
    case: str, tmp_path: Path
) -> None:
    save = named(case)
    export_pyreft(brought_in(save, tmp_path), tmp_path / "exported")
    theirs = sorted(file.name for file in save.path.iterdir())
    assert sorted(file.name for file in (tmp_path / "exported").iterdir()) == theirs
    configs = [
        json.loads((path / "config.json").read_text())
        for path in (save.path, tmp_path / "exported")
    ]
    assert configs[0].pop("transformers_version")
    assert configs[0] == configs[1]
    for file in save.path.glob("*.bin"):
        held, ours = (
            torch.load(path / file.name, weights_only=True)
            for path in (save.path, tmp_path / "exported")
        )
        assert {name: (t.shape, t.dtype) for name, t in held.items()} == {
            name: (t.shape, t.dtype) for name, t in ours.items()
        }


@pytest.mark.parametrize(
    "case", ["direft_f5l5", "consreft_f5l5", "lobireft_l1", "direft_bf16_f3l3_tied"]
)
def test_torch_computes_R_from_the_exported_parametrisation(case: str, tmp_path: Path) -> None:
    save = named(case)
    adapter = brought_in(save, tmp_path)
    export_pyreft(adapter, tmp_path / "exported")
    files = json.loads((tmp_path / "exported" / "config.json").read_text())["sorted_keys"]
    for key, weights in zip(files, adapter.weights, strict=True):
        held = torch.load(tmp_path / "exported" / f"intkey_{key}.bin", weights_only=True)
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.linalg.qr(torch.randn(64, 4))[0])
        orthogonal(layer)
        layer.load_state_dict(
            {
                n.removeprefix("rotate_layer."): t
                for n, t in held.items()
                if n.startswith("rotate_layer.")
            }
        )
        torch.testing.assert_close(layer.weight.mT, weights.projection, rtol=0, atol=1e-6)
        base = held["rotate_layer.parametrizations.weight.0.base"]
        torch.testing.assert_close(base @ base.mT, torch.eye(64), rtol=0, atol=1e-5)


def test_a_square_rotation_comes_back_through_the_matrix_exponential(tmp_path: Path) -> None:
    R = torch.linalg.qr(torch.randn(8, 8))[0].contiguous()
    save = named("lobireft_l1")
    base = save.base.model_copy(update={"hidden_size": 8})
    adapter = read_any(save.path, save.base, save.flags)
    spec = adapter.manifest.interventions[0].model_copy(update={"rank": 8})
    manifest = adapter.manifest.model_copy(update={"base_model": base, "interventions": (spec,)})
    weights = type(adapter.weights[0])("lobireft", torch.ones(8), R=R)
    export_pyreft(publish(tmp_path / "adapter", manifest, [weights]), tmp_path / "exported")
    again = read_any(tmp_path / "exported", base, save.flags)
    torch.testing.assert_close(again.weights[0].projection, R, rtol=0, atol=1e-6)


def test_an_R_that_is_not_orthonormal_survives_the_export(tmp_path: Path) -> None:
    save = named("direft_l1")
    adapter = read_any(save.path, save.base, save.flags)
    tensors = adapter.weights[0].tensors()
    bent = type(adapter.weights[0]).of("direft", tensors | {"R": tensors["R"] * 1.1})
    export_pyreft(publish(tmp_path / "adapter", adapter.manifest, [bent]), tmp_path / "exported")
    again = read_any(tmp_path / "exported", save.base, save.flags)
    torch.testing.assert_close(again.weights[0].projection, bent.projection, rtol=0, atol=1e-6)
    assert any("not orthonormal" in warning for warning in again.warnings)


def test_interleaved_halves_are_exported_prefix_first(tmp_path: Path) -> None:
    save = named("loreft_f5l5")
    adapter = read_any(save.path, save.base, save.flags)
    order = (0, 2, 1, 3)
    manifest = adapter.manifest.model_copy(
        update={"interventions": tuple(adapter.manifest.interventions[k] for k in order)}
    )
    mixed = publish(tmp_path / "adapter", manifest, [adapter.weights[k] for k in order])
    export_pyreft(mixed, tmp_path / "exported")
    assert read_any(tmp_path / "exported", save.base, save.flags).manifest == adapter.manifest


def test_an_untied_adapter_whose_halves_differ_cannot_be_exported(tmp_path: Path) -> None:
    save = named("loreft_f5l5")
    adapter = read_any(save.path, save.base, save.flags)
    manifest = adapter.manifest.model_copy(
        update={"interventions": adapter.manifest.interventions[:3]}
    )
    lopsided = publish(tmp_path / "adapter", manifest, adapter.weights[:3])
    with pytest.raises(AdapterUnsupported, match="same layers for the prefix and for the suffix"):
        export_pyreft(lopsided, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    adapter = brought_in(named("loreft_l1"), tmp_path)
    (tmp_path / "taken").mkdir()
    with pytest.raises(AdapterExists):
        export_pyreft(adapter, tmp_path / "taken")
    assert not list((tmp_path / "taken").iterdir())


def test_the_flags_that_pyreft_does_not_record_are_told(tmp_path: Path) -> None:
    adapter = brought_in(named("loreft_f5l5"), tmp_path)
    assert shlex.split(import_flags(adapter)) == ["--positions=f5+l5", "--untied"]
    rule = PositionRule("-1", last_offset=1, phase="all")
    told = import_flags(
        Adapter(adapter.manifest.model_copy(update={"positions": rule}), adapter.weights, "0")
    )
    assert shlex.split(told) == ["--positions=-1", "--last-offset", "1", "--phase", "all"]


def test_an_imported_adapter_reads_back_with_the_digest_it_was_published_under(
    tmp_path: Path,
) -> None:
    adapter = brought_in(named("loreft_f3l3_tied"), tmp_path)
    assert read_adapter(tmp_path / "adapter").digest == adapter.digest
    old = GOLDEN / "old_pyreft0.0.8_pyvene0.1.6" / "loreft_f3l3_tied"
    save = named("loreft_f3l3_tied")
    assert import_adapter(old, save.base, tmp_path / "old", save.flags).digest == adapter.digest
