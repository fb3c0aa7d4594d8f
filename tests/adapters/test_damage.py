"""Every kind of damage gets its sentence, from the reader and from the command, and never a
traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.directory import read_adapter
from reft_serve.adapters.manifest import EngineLimits
from reft_serve.adapters.structure import check_structure
from reft_serve.cli.app import app
from reft_serve.errors import AdapterInvalid
from tests.support.adapters.damage import DAMAGE, MAX_BYTES, MAX_RANK, MODEL, Damage, write_good


def faults(path: Path) -> list[str]:
    try:
        adapter = read_adapter(path, MAX_BYTES)
    except AdapterInvalid as exc:
        return list(exc.faults)
    return EngineLimits(max_rank=MAX_RANK).faults(adapter.manifest, read_base_model(MODEL))


def check(path: Path) -> tuple[int, list[str]]:
    result = CliRunner(env={"REFT_MAX_ADAPTER_BYTES": str(MAX_BYTES)}).invoke(
        app, ["adapter", "check", str(path), "--base", str(MODEL), "--max-rank", str(MAX_RANK)]
    )
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout.splitlines()


def test_the_undamaged_adapter_is_sound(tmp_path: Path) -> None:
    digest = write_good(tmp_path / "a").digest
    assert faults(tmp_path / "a") == []
    code, lines = check(tmp_path / "a")
    assert code == 0
    assert len(lines) == 1
    assert digest in lines[0]


def test_the_table_names_each_damage_once() -> None:
    assert len({damage.name for damage in DAMAGE}) == len(DAMAGE) >= 30


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.name)
def test_damage_gets_its_sentence(damage: Damage, tmp_path: Path) -> None:
    write_good(tmp_path / "a")
    damage.apply(tmp_path / "a")
    found = faults(tmp_path / "a")
    assert any(damage.phrase in fault for fault in found), found
    assert all("\n" not in fault for fault in found)
    code, lines = check(tmp_path / "a")
    # Of two tensors that overlap, safetensors names either.
    assert (code, len(lines)) == (1, len(found))
    assert any(damage.phrase in line for line in lines), lines


def test_several_faults_are_told_at_once(tmp_path: Path) -> None:
    write_good(tmp_path / "a")
    by_name = {damage.name: damage for damage in DAMAGE}
    for name in ("NaN", "W2 all zeros"):
        by_name[name].apply(tmp_path / "a")
    assert len(faults(tmp_path / "a")) == 2
    by_name["bad kind"].apply(tmp_path / "a")
    by_name["bad phase"].apply(tmp_path / "a")
    assert len(faults(tmp_path / "a")) == 2


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.name)
def test_what_is_told_without_torch_is_what_the_reader_tells(
    damage: Damage, tmp_path: Path
) -> None:
    write_good(tmp_path / "a")
    damage.apply(tmp_path / "a")
    told = told_by(lambda: read_adapter(tmp_path / "a", 1 << 30))
    without_torch = told_by(lambda: check_structure(tmp_path / "a", str(tmp_path / "a")))
    # The two parsers of a damaged file do not word its damage alike.
    assert {_unworded(fault) for fault in without_torch} <= {_unworded(fault) for fault in told}
    numbers_tell = ("NaN", "finite", "all zeros", "no effect")
    assert without_torch or all(any(words in fault for words in numbers_tell) for fault in told), (
        told
    )


def told_by(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except AdapterInvalid as exc:
        return list(exc.faults)
    return []


def _unworded(fault: str) -> str:
    return fault.partition("is damaged or not a safetensors file")[0]
