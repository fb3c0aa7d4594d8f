"""What an adapter's files may cost before they are refused: bounded time, memory and report, wherever they are read."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reft_serve.adapters.directory import read_adapter
from reft_serve.adapters.structure import (
    CONFIG,
    LORA_CONFIG,
    LORA_TENSORS,
    TENSORS,
    check_structure,
)
from reft_serve.errors import AdapterInvalid
from tests.support.gateway.harness import adapter_files

GOOD = json.loads(adapter_files()[CONFIG])
SPEC = GOOD["interventions"][0]


def header_of(entries: str, size: int = 0) -> bytes:
    return len(entries).to_bytes(8, "little") + entries.encode() + bytes(size)


def _scalar(i: int) -> str:
    return f'"t{i}":{{"dtype":"F32","shape":[],"data_offsets":[{4 * i},{4 * i + 4}]}}'


def shaped(shape: str) -> bytes:
    return header_of(
        '{"interventions.0.R":{"dtype":"F32","shape":' + shape + ',"data_offsets":[0,0]}}'
    )


def manifest(**changes: Any) -> bytes:
    return json.dumps(GOOD | changes).encode()


DIGITS = "9" * 4000
TENSOR_FILES = {
    "numbers of thousands of digits": shaped(f"[{','.join([DIGITS] * 700)}]"),
    "numbers of twenty digits": shaped(f"[{','.join(['9' * 20] * 8)}]"),
    "many dimensions": shaped(f"[{','.join(['1'] * 100_000)}]"),
    "a dimension that is too large": shaped(f"[0,{1 << 40}]"),
    "a shape that is text": shaped(f'"{"1" * 100_000}"'),
    "an exponent": shaped("[1e999]"),
    "many tensors": header_of("{" + ",".join(_scalar(i) for i in range(66_000)) + "}", 4 * 66_000),
    "unknown tensors": header_of("{" + ",".join(_scalar(i) for i in range(60_000)) + "}", 4 * 60_000),
    "a name twice": header_of('{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}'),
    "a long name": header_of('{"' + "n" * 1_000_000 + '":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "a header of brackets": header_of("[" * 100_000),
}  # fmt: skip
MANIFESTS = {
    "empty interventions": b'{"interventions":[' + b"{}," * 200_000 + b"{}]}",
    "as many empty interventions as are taken": manifest(interventions=[{}] * 8192),
    "interventions of unknown keys": manifest(interventions=[SPEC | {f"k{i}": i for i in range(20)}] * 5000),
    "an intervention of many keys": manifest(interventions=[SPEC | {f"k{i}": i for i in range(100_000)}]),
    "many keys": manifest(**{f"k{i}": i for i in range(100_000)}),
    "a base model of many keys": manifest(base_model={f"k{i}": i for i in range(100_000)}),
    "positions of many keys": manifest(positions={f"k{i}": i for i in range(100_000)}),
    "a provenance of lists": manifest(provenance={f"k{i}": [] for i in range(100_000)}),
    "a long spelling of positions": manifest(positions={"spec": "0," * 500_000}),
    "a long activation": manifest(interventions=[SPEC | {"activation": "a" * 1_000_000}] * 3),
    "layers that are not there": manifest(interventions=[SPEC | {"layer": 9}] * 8192),
    "a number of thousands of digits": manifest().replace(b'"rank": 2', b'"rank": ' + b"9" * 4000),
    "a number that is too long": manifest().replace(b'"rank": 2', b'"rank": ' + b"9" * 400_000),
    "all edits at one place": manifest(interventions=[SPEC] * 8192),
}  # fmt: skip


def refusal(check: Callable[[], object]) -> AdapterInvalid:
    started = time.process_time()
    with pytest.raises(AdapterInvalid) as caught:
        check()
    assert time.process_time() - started < 10  # what is not bounded takes minutes, or gigabytes
    assert len(caught.value.faults) <= 21
    assert len(str(caught.value)) < 10_000
    return caught.value


def written(folder: Path, **changes: bytes) -> Path:
    for name, content in (
        adapter_files() | {f"{stem}.{end}": v for (stem, end), v in _named(changes)}
    ).items():
        (folder / name).write_bytes(content)
    return folder


def _named(changes: dict[str, bytes]) -> list[tuple[tuple[str, str], bytes]]:
    ends = {"reft_config": "json", "adapter_config": "json"}
    return [((stem, ends.get(stem, "safetensors")), content) for stem, content in changes.items()]


@pytest.mark.parametrize("case", TENSOR_FILES)
def test_a_costly_tensor_file_is_refused_cheaply(case: str, tmp_path: Path) -> None:
    path = written(tmp_path, reft_model=TENSOR_FILES[case])
    refusal(lambda: check_structure(path, "x"))
    refusal(lambda: read_adapter(path))


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_costly_manifest_is_refused_cheaply(case: str, tmp_path: Path) -> None:
    path = written(tmp_path, reft_config=MANIFESTS[case])
    refusal(lambda: check_structure(path, "x"))
    refusal(lambda: read_adapter(path))


@pytest.mark.parametrize("alpha", ["1" + "0" * 400, "1e999", "-1e999", "true", '"8"'])
def test_a_lora_with_a_number_that_is_none_is_refused(alpha: str, tmp_path: Path) -> None:
    config = (
        b'{"peft_type": "LORA", "r": 1' + b"0" * 400 + b', "lora_alpha": ' + alpha.encode() + b"}"
    )
    path = written(tmp_path, adapter_config=config, adapter_model=header_of("{}"))
    assert sorted(path.iterdir()) == sorted(
        path / name for name in (CONFIG, TENSORS, LORA_CONFIG, LORA_TENSORS)
    )
    found = refusal(lambda: check_structure(path, "x"))
    assert "r must be a whole number" in str(found)
    refusal(lambda: read_adapter(path))


def test_the_first_twenty_faults_are_reported_and_the_rest_counted(tmp_path: Path) -> None:
    found = refusal(
        lambda: check_structure(
            written(tmp_path, reft_config=MANIFESTS["layers that are not there"]), "x"
        )
    )
    assert found.faults[0].startswith("intervention 0 is at layer 9")
    assert found.faults[19].startswith("intervention 19 is at layer 9")
    assert found.faults[20] == "and 8,174 more faults"
    again = AdapterInvalid("another name", found.faults)
    assert again.faults == found.faults


def test_the_first_faults_of_very_many_interventions_are_named(tmp_path: Path) -> None:
    manifests = MANIFESTS["as many empty interventions as are taken"]
    found = refusal(lambda: check_structure(written(tmp_path, reft_config=manifests), "x"))
    assert found.faults[0] == "reft_config.json, interventions.0.layer: Field required"
    assert found.faults[4] == "reft_config.json, interventions.1.layer: Field required"
    assert re.fullmatch(r"and 32,7\d\d more faults", found.faults[20])
