"""Every save of real pyreft comes in with exactly the tensors that pyreft computes with, or is
refused by name.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reft_serve.adapters.importers.common import Imported, ImportFlags
from reft_serve.adapters.importers.detection import read_any
from reft_serve.adapters.importers.pyreft import read_pyreft
from reft_serve.errors import (
    AdapterInvalid,
    AdapterUnsupported,
    ClientError,
    ImportFlagMissing,
    PositionsInvalid,
)
from tests.support.adapters.loras import write_lora
from tests.support.adapters.saves import IMPORTABLE, SAVES, Save, named
from tests.support.paths import GOLDEN

PARAMETRISED = ("direft", "consreft", "lobireft")


def bring_in(save: Save, path: Path | None = None, **flags: Any) -> Imported:
    return read_any(path or save.path, save.base, replace(save.flags, **flags))


def assert_same_tensors(imported: Imported, save: Save) -> None:
    expected = save.parameters()
    assert len(imported.weights) == len(expected)
    for weights, theirs in zip(imported.weights, expected, strict=True):
        ours = weights.tensors()
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            if name == "R" and weights.kind in PARAMETRISED:
                torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)
            else:
                assert torch.equal(ours[name].float(), tensor.float()), name


def copied(save: Save, to: Path) -> Path:
    return shutil.copytree(save.path, to / "save")


def test_most_golden_saves_are_importable() -> None:
    assert len(IMPORTABLE) >= 48


@pytest.mark.parametrize("save", IMPORTABLE, ids=lambda save: save.name)
def test_an_import_has_the_tensors_that_pyreft_computes_with(save: Save) -> None:
    assert_same_tensors(bring_in(save), save)


@pytest.mark.parametrize("version", ["old_pyreft0.0.8_pyvene0.1.6", "old_pyreft0.0.6_pyvene0.1.2"])
@pytest.mark.parametrize(
    "case",
    [
        "loreft_f5l5",
        "loreft_f3l3_tied",
        "loreft_path_block",
        "noreft_l1",
        "lobireft_l1",
        "direft_f5l5",
        "nodireft_l1",
    ],
)
def test_the_dotted_names_of_old_pyvene_give_the_same_adapter(version: str, case: str) -> None:
    save = named(case)
    old, new = bring_in(save, GOLDEN / version / case), bring_in(save)
    assert_same_tensors(old, save)
    assert old.manifest == new.manifest


def test_rows_of_thirteen_entries_are_read_like_those_of_fourteen(tmp_path: Path) -> None:
    save = named("loreft_f5l5")
    path = copied(save, tmp_path)
    edit_config(
        path, lambda c: c.update(representations=[row[:13] for row in c["representations"]])
    )
    assert bring_in(save, path).manifest == bring_in(save).manifest


@pytest.mark.parametrize("rank", [None, 2, 4096])
def test_a_missing_or_wrong_recorded_rank_gives_way_to_the_tensors(
    tmp_path: Path, rank: int | None
) -> None:
    save = named("loreft_l1")
    path = copied(save, tmp_path)
    edit_config(path, lambda c: c["representations"][0].__setitem__(4, rank))
    assert [spec.rank for spec in bring_in(save, path).manifest.interventions] == [4]


def test_a_checkpoint_is_read_from_its_folder_or_from_the_one_inside() -> None:
    save = named("trained_ckpt_f2l2")
    checkpoint = save.path if save.path.name.startswith("checkpoint") else save.path.parent
    for path in (checkpoint, checkpoint / "intervenable_model"):
        assert_same_tensors(bring_in(save, path), save)


def test_a_checkpoint_needs_its_kind_said_even_where_keys_would_give_it_away() -> None:
    save = named("trained_ckpt_f2l2")
    with pytest.raises(ImportFlagMissing, match="--kind"):
        bring_in(save, kind=None)


def test_a_wrong_kind_of_a_checkpoint_is_told_from_its_tensors() -> None:
    with pytest.raises(AdapterInvalid, match="a nodireft needs W2"):
        bring_in(named("trained_ckpt_f2l2"), kind="nodireft")


def test_missing_positions_are_asked_for_by_flag_with_the_recipes() -> None:
    with pytest.raises(ImportFlagMissing, match=r"--positions.*f7\+l7.*--untied.*--last-offset 1"):
        bring_in(named("loreft_l1"), positions=None)


def test_the_flags_reach_the_manifest() -> None:
    save = named("loreft_relu_f3l3_tied")
    imported = bring_in(save, positions="l2", last_offset=1, activation="tanh", phase="all")
    assert imported.manifest.positions.spec == "l2"
    assert imported.manifest.positions.last_offset == 1
    assert imported.manifest.positions.phase == "all"
    assert {spec.activation for spec in imported.manifest.interventions} == {"tanh"}


def test_untied_rows_are_the_prefix_first_and_the_suffix_second() -> None:
    imported = bring_in(named("loreft_f5l5"))
    assert [(s.layer, s.part) for s in imported.manifest.interventions] == [
        (1, "prefix"),
        (3, "prefix"),
        (1, "suffix"),
        (3, "suffix"),
    ]


def test_two_like_halves_without_untied_are_warned_of_and_not_guessed() -> None:
    imported = bring_in(named("loreft_f5l5"), untied=False)
    assert {spec.part for spec in imported.manifest.interventions} == {"both"}
    assert any("--untied" in warning for warning in imported.warnings)
    assert not bring_in(named("loreft_f3l3_tied")).warnings


def test_untied_with_an_odd_number_of_rows_is_a_fault() -> None:
    with pytest.raises(AdapterInvalid, match="even number of interventions"):
        bring_in(named("loreft_l1"), positions="f1+l1", untied=True)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("blocks", [3, 4])
def test_more_than_two_interventions_at_one_place_are_refused(
    tmp_path: Path, blocks: int, untied: bool
) -> None:
    save = named("loreft_l1")
    path = copied(save, tmp_path)
    (key,) = json.loads((path / "config.json").read_text())["sorted_keys"]
    keys = [f"{key.partition('#')[0]}#{k}" for k in range(blocks)]
    for name in keys[1:]:
        shutil.copyfile(path / f"intkey_{key}.bin", path / f"intkey_{name}.bin")
    edit_config(
        path,
        lambda c: c.update(
            sorted_keys=keys,
            representations=c["representations"] * blocks,
            intervention_types=c["intervention_types"] * blocks,
        ),
    )
    with pytest.raises(
        AdapterUnsupported, match=f"{blocks} interventions at layer .* each for different tokens"
    ):
        bring_in(save, path, positions="f2+l2", untied=untied)


def test_untied_with_halves_that_differ_is_a_fault() -> None:
    with pytest.raises(AdapterInvalid, match="its halves differ"):
        bring_in(named("loreft_f3l3_tied"), untied=True)


def test_untied_without_a_prefix_and_a_suffix_is_a_fault() -> None:
    with pytest.raises(PositionsInvalid, match="cannot be untied"):
        bring_in(named("loreft_f5l5"), positions="l5")


@pytest.mark.parametrize(
    ("case", "flags", "phrase"),
    [
        ("noreft_l1", {"no_bias": True}, "holds proj_layer.bias"),
        ("loreft_l1", {"no_bias": True}, "for noreft and nodireft"),
        ("lobireft_l1", {"activation": "relu"}, "a lobireft has none"),
        ("loreft_l1", {"kind": "direft"}, "records that intervention 0 is a loreft"),
        ("loreft_l1", {"kind": "loraft"}, "--kind 'loraft' is not one of"),
        ("loreft_l1", {"activation": "softmax"}, "--activation 'softmax' is not one of"),
        ("loreft_l1", {"phase": "decode"}, "--phase 'decode' is not one of"),
        ("loreft_l1", {"positions": "l1+f1"}, "not understood"),
    ],
)
def test_a_flag_that_contradicts_the_save_is_a_fault(
    case: str, flags: dict[str, Any], phrase: str
) -> None:
    with pytest.raises(ClientError, match=phrase):
        bring_in(named(case), **flags)


def test_a_save_without_a_bias_imports_without_the_flag_because_the_file_shows_it() -> None:
    save = named("noreft_nobias_l1")
    assert_same_tensors(bring_in(save, no_bias=False), save)


@pytest.mark.parametrize(
    ("case", "phrase"),
    [
        ("loreft_mlp_input", "'mlp_input'"),
        ("loreft_attention_input", "'attention_input'"),
        ("loreft_attention_value_output", "'attention_value_output'"),
        ("loreft_mlp_activation", "'mlp_activation'"),
        ("loreft_query_output", "'query_output'"),
        ("loreft_value_output", "'value_output'"),
        ("loreft_path_norm", r"'model\.norm\.output'"),
        ("subloreft_a", r"__main__\.SubloreftIntervention"),
    ],
)
def test_what_is_not_served_is_refused_by_name(case: str, phrase: str) -> None:
    save = named(case)
    with pytest.raises(AdapterUnsupported, match=phrase):
        bring_in(save)


def test_a_lora_that_pyreft_saved_needs_its_alpha_and_becomes_pefts() -> None:
    save = named("loreft_plus_lora")
    with pytest.raises(ImportFlagMissing, match=r"holds 4 tensors of a LoRA .* give --lora-alpha"):
        bring_in(save, lora_alpha=None)
    lora = bring_in(save).lora
    assert lora is not None
    assert lora.rank == 4
    config = json.loads(lora.files["adapter_config.json"])
    assert config["lora_alpha"] == 8
    assert config["target_modules"] == [f"model.layers.{k}.self_attn.o_proj" for k in (1, 2)]
    with pytest.raises(ClientError, match="the save holds no LoRA"):
        bring_in(named("loreft_f1"), lora_alpha=8.0)


def test_pefts_files_beside_a_save_come_in_with_it(tmp_path: Path) -> None:
    path = tmp_path / "save"
    shutil.copytree(named("loreft_f1").path, path)
    write_lora(path)
    lora = bring_in(named("loreft_f1"), path).lora
    assert lora is not None
    assert (
        lora.files["adapter_model.safetensors"] == (path / "adapter_model.safetensors").read_bytes()
    )


def test_every_golden_save_is_either_imported_or_refused_by_a_test_above() -> None:
    for save in SAVES:
        if save not in IMPORTABLE and not save.name.endswith(
            "loreft_cls"
        ):  # which `test_heads` imports
            with pytest.raises(AdapterUnsupported):
                bring_in(save)


def edit_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def _row(index: int, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["representations"][0].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (_row(0, -1), "layer '-1' of block_output is not a layer number"),
        (_row(0, 4), "is at layer 4 and the base model has 4"),
        (_row(0, True), "is not a layer number"),
        (_row(1, ["block_output"]), "is not an editable component"),
        (_row(2, "h.pos"), r"the unit 'h\.pos'"),
        (_row(3, 2), "several units"),
        (_row(7, [[0, 1]]), "subspace_partition"),
        (_row(8, 0), "group_key"),
        (_row(9, 0), "intervention_link_key"),
        (_row(10, 0), "moe_key"),
        (_row(11, [0.0]), "source_representation"),
        (lambda c: c.update(mode="serial"), "mode is 'serial'"),
        (lambda c: c.update(representations=[[1, 2, 3]]), "not a list of 13 or 14"),
        (lambda c: c.update(representations={}), "must list representations"),
        (lambda c: c.pop("sorted_keys"), "must list representations"),
        (lambda c: c.update(sorted_keys=[]), "have 1, 1 and 0 entries"),
        (lambda c: c.update(sorted_keys=["../../secret#0"]), "is not the key of an intervention"),
        (lambda c: c.update(sorted_keys=["layer_2#9"]), "intkey_layer_2#9.bin is missing"),
        (lambda c: c.update(intervention_types=[7]), "names no class"),
        (lambda c: c.update(intervention_types=["<class 'os.system'>"]), r"is a os\.system"),
        (
            lambda c: c.update(
                intervention_types=["<class 'pyreft.interventions.DireftIntervention'>"]
            ),
            "a direft",
        ),
    ],
)
def test_a_doctored_configuration_gets_a_sentence(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], phrase: str
) -> None:
    save = named("lobireft_l1")
    path = copied(save, tmp_path)
    edit_config(path, change)
    with pytest.raises(AdapterInvalid, match=phrase):
        bring_in(save, path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a": NaN'])
def test_a_configuration_that_is_no_json_object_gets_a_sentence(tmp_path: Path, text: str) -> None:
    save = named("loreft_l1")
    path = copied(save, tmp_path)
    (path / "config.json").write_text(text)
    with pytest.raises(AdapterInvalid, match=r"config\.json is not"):
        bring_in(save, path)


def _saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class _Runs:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch pwned",)


def _bomb() -> bytes:
    source, packed = (
        zipfile.ZipFile(io.BytesIO(_saved({"weight": torch.zeros(1 << 20)}))),
        io.BytesIO(),
    )
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"", "damaged or was not written by torch.save"),
        (b"\x80\x02}q\x00.", "damaged or was not written by torch.save"),
        (_saved({"weight": _Runs()}), "cannot be loaded as plain tensors"),
        (_saved([torch.zeros(2)]), "objects other than named, dense tensors"),
        (_saved({"weight": 3}), "objects other than named, dense tensors"),
        (
            _saved({"weight": torch.zeros(1).expand(10**9, 10**9)}),
            "objects other than named, dense tensors",
        ),
        (_saved({"weight": torch.zeros(2, 2).to_sparse()}), "plain tensors|named, dense tensors"),
        (_bomb(), "unpacks to"),
        (_saved({"weight": torch.zeros(1 << 20)}), "at most"),
        (_saved({"rotate_layer": torch.eye(64)[:, :4], "gate": torch.zeros(1)}), "'gate'"),
        (_saved({"weight": torch.zeros(4, 64), "bias": torch.zeros(4)}), "a loreft needs R"),
        (
            _saved({"weight": torch.zeros(4, 64), "learned_source.weight": torch.zeros(4, 64)}),
            "two layouts",
        ),
        (
            _saved(
                {
                    "rotate_layer": torch.zeros(64),
                    "weight": torch.ones(4, 64),
                    "bias": torch.ones(4),
                }
            ),
            "must be a matrix",
        ),
        (
            _saved(
                {
                    "rotate_layer": torch.eye(64)[:, :4],
                    "weight": torch.ones(4, 32),
                    "bias": torch.ones(4),
                }
            ),
            r"W has shape \(4, 32\)",
        ),
        (
            _saved(
                {
                    "rotate_layer": torch.eye(32)[:, :4],
                    "weight": torch.ones(4, 32),
                    "bias": torch.ones(4),
                }
            ),
            r"R has shape \(4, 32\) and must have \(4, 64\)",
        ),
        (
            _saved(
                {
                    "rotate_layer": torch.eye(64)[:, :4],
                    "weight": torch.ones(4, 64).double(),
                    "bias": torch.ones(4),
                }
            ),
            "float64",
        ),
        (
            _saved(
                {
                    "rotate_layer": torch.eye(64)[:, :4].int(),
                    "weight": torch.ones(4, 64),
                    "bias": torch.ones(4),
                }
            ),
            "R is int32 and must be floats",
        ),
        (
            _saved(
                {
                    "rotate_layer": torch.eye(64)[:, :4] * torch.nan,
                    "weight": torch.ones(4, 64),
                    "bias": torch.ones(4),
                }
            ),
            "NaN or Inf",
        ),
        (
            _saved(
                {
                    "rotate_layer": torch.zeros(64, 4),
                    "weight": torch.ones(4, 64),
                    "bias": torch.ones(4),
                }
            ),
            "all zeros",
        ),
        (
            _saved({"rotate_layer.parametrizations.weight.original": torch.zeros(64, 4)}),
            "weight.0.base is missing",
        ),
        (
            _saved(
                {
                    "rotate_layer.parametrizations.weight.original": torch.zeros(64, 4),
                    "rotate_layer.parametrizations.weight.0.base": torch.zeros(4, 64),
                }
            ),
            "do not agree",
        ),
    ],
)
def test_a_doctored_tensor_file_gets_a_sentence_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, phrase: str
) -> None:
    save = named("loreft_l1")
    path = copied(save, tmp_path)
    next(path.glob("*.bin")).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterInvalid, match=phrase):
        read_pyreft(path, save.base, save.flags, max_bytes=1 << 20)
    assert not (tmp_path / "pwned").exists()


def test_a_linked_tensor_file_is_refused(tmp_path: Path) -> None:
    save = named("loreft_l1")
    path = copied(save, tmp_path)
    file = next(path.glob("*.bin"))
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterInvalid, match="symbolic link"):
        bring_in(save, path)


def test_the_diagonal_that_weight_decay_moved_gives_zero_columns_as_in_torch(
    tmp_path: Path,
) -> None:
    save = named("direft_l1")
    path = copied(save, tmp_path)
    file = next(path.glob("*.bin"))
    held = torch.load(file, weights_only=True)
    held["rotate_layer.parametrizations.weight.original"].diagonal().mul_(0.9999)
    torch.save(held, file)
    with pytest.raises(AdapterInvalid, match="R is all zeros"):
        bring_in(save, path)


@pytest.mark.parametrize(("width", "rank"), [(8, 8), (8, 3), (8, 1)])
def test_a_rotation_is_what_torch_computes_for_any_shape(
    tmp_path: Path, width: int, rank: int
) -> None:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(
        torch.linalg.qr(torch.randn(width, width))[0][:, :rank].contiguous()
    )
    torch.nn.utils.parametrizations.orthogonal(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original += torch.randn(width, rank).tril(-1)
    save = named("lobireft_l1")
    path = copied(save, tmp_path)
    held = {f"rotate_layer.{name}": tensor for name, tensor in layer.state_dict().items()}
    torch.save({**held, "learned_source": torch.ones(rank)}, next(path.glob("*.bin")))
    imported = read_pyreft(
        path, save.base.model_copy(update={"hidden_size": width}), ImportFlags(positions="l1")
    )
    torch.testing.assert_close(imported.weights[0].projection, layer.weight.mT, rtol=0, atol=1e-6)
