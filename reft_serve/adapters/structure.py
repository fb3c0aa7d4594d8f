"""What can be told of an adapter's files without torch: the manifest, and each tensor's name, shape, dtype and extent.

`directory.read_adapter`, which the engine calls when it loads a version, also looks at the numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_serve.adapters.files import read_plain
from reft_serve.adapters.manifest import InterventionSpec, Manifest, parse_manifest
from reft_serve.errors import AdapterInvalid
from reft_serve.interventions.vocabulary import optional_tensors, required_tensors

__all__ = ["FILES", "check_structure"]

CONFIG, TENSORS = "reft_config.json", "reft_model.safetensors"
LORA_CONFIG, LORA_TENSORS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, TENSORS, LORA_CONFIG, LORA_TENSORS)
_MAX_CONFIG_BYTES, _MAX_HEADER_BYTES = 4 << 20, 16 << 20
_WIDTHS = {
    **{"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]


def check_structure(path: Path, where: str) -> Manifest:
    """Check the files of a directory and give its manifest.

    Args:
        path: the directory, with some of FILES in it.
        where: what messages call the adapter.

    Raises:
        AdapterInvalid: every fault found.
    """
    present = {file.name for file in path.iterdir()}
    faults = [f"{name} is missing" for name in (CONFIG, TENSORS) if name not in present]
    if (LORA_CONFIG in present) != (LORA_TENSORS in present):
        faults.append(f"{LORA_CONFIG} and {LORA_TENSORS} belong together: one of them is missing")
    if faults:
        raise AdapterInvalid(where, faults)
    manifest = parse_manifest(read_plain(path / CONFIG, _MAX_CONFIG_BYTES, where), where)
    faults = list(_faults(manifest, _header(path / TENSORS, where)))
    if LORA_TENSORS in present:
        _header(path / LORA_TENSORS, where)
    if faults:
        raise AdapterInvalid(where, faults)
    return manifest


def _faults(manifest: Manifest, entries: Mapping[str, _Entry]) -> Iterator[str]:
    expected = {
        f"interventions.{k}.{name}": (k, spec, name)
        for k, spec in enumerate(manifest.interventions)
        for name in (*required_tensors(spec.kind), *optional_tensors(spec.kind))
    }
    for k, spec in enumerate(manifest.interventions):
        for name in sorted(required_tensors(spec.kind)):
            if f"interventions.{k}.{name}" not in entries:
                yield f"tensor interventions.{k}.{name} is missing from {TENSORS}"
        if spec.rank > manifest.base_model.hidden_size:
            width = manifest.base_model.hidden_size
            yield f"intervention {k} ({spec.where}): rank {spec.rank} is larger than the hidden size {width}"
    for name, entry in sorted(entries.items()):
        if name not in expected:
            yield f"tensor {name[:80]!r} of {TENSORS} belongs to no intervention of {CONFIG}"
        else:
            k, spec, letter = expected[name]
            for fault in _entry_faults(entry, spec, letter, manifest.base_model.hidden_size):
                yield f"intervention {k} ({spec.where}): {fault}"


def _entry_faults(entry: _Entry, spec: InterventionSpec, letter: str, width: int) -> Iterator[str]:
    shape = (spec.rank,) if letter in ("b", "b2") else (spec.rank, width)
    kept_full = letter == "R" or (letter == "b" and "W" not in required_tensors(spec.kind))
    dtype = "F32" if kept_full else _DTYPES[spec.dtype]
    if entry.shape != shape:
        yield f"{letter} has shape {entry.shape} and must have {shape}"
    if entry.dtype != dtype:
        yield f"{letter} is {entry.dtype} and must be {dtype}"


def _header(file: Path, where: str) -> dict[str, _Entry]:
    """The entries of a safetensors file whose parts lie side by side, to its last byte."""
    try:
        return _read_header(file)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise AdapterInvalid(where, [f"{file.name} is damaged or not a safetensors file ({reason})"]) from exc


def _read_header(file: Path) -> dict[str, _Entry]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError("its header is longer than the file, or than is taken")
        header: Any = json.loads(opened.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    extents, entries = [], {}
    for name, entry in header.items():
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError(f"tensor {name[:80]!r} has a shape or an extent that is no number")
        if end - begin != math.prod(shape) * _WIDTHS[entry["dtype"]]:
            raise ValueError(f"tensor {name[:80]!r} has more or fewer bytes than its shape")
        extents.append((begin, end))
        entries[name] = _Entry(entry["dtype"], shape)
    at = 0
    for begin, end in sorted(extents):
        if begin != at:
            raise ValueError("its tensors overlap or leave a gap")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"it has {size - 8 - length} bytes of tensors and its header tells of {at}")
    return entries
