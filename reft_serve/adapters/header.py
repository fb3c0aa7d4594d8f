"""The header of a safetensors file, read without torch: each tensor's name, dtype and shape, and
that the bytes fit them.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from reft_serve.errors import AdapterInvalid
from reft_serve.storage.files import open_regular_file

__all__ = [
    "MAX_DIMENSION",
    "MAX_DIMENSIONS",
    "MAX_HEADER_BYTES",
    "MAX_TENSORS",
    "Entry",
    "header_bytes",
    "read_header",
]

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 8
# Most of one dimension; so the product of all of them is a small number of machine words.
MAX_DIMENSION = 1 << 40
_MAX_DIGITS = 20
# By the names of the file format: the name that torch has for the type, and its bytes.
_DTYPES = {
    **{"F64": ("float64", 8), "I64": ("int64", 8), "U64": ("uint64", 8), "C64": ("complex64", 8)},
    **{"F32": ("float32", 4), "I32": ("int32", 4), "U32": ("uint32", 4)},
    **{"F16": ("float16", 2), "BF16": ("bfloat16", 2), "I16": ("int16", 2), "U16": ("uint16", 2)},
    **{"I8": ("int8", 1), "U8": ("uint8", 1), "BOOL": ("bool", 1)},
    **{"F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1)},
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as the header describes it; `dtype` in torch's spelling, for instance float32."""

    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path, where: str) -> dict[str, Entry]:
    """The entries of a safetensors file whose tensors lie side by side, to its last byte.

    Raises:
        AdapterInvalid: it is not a regular file, damaged, or another kind of file; `where` is the
            adapter that the message names.
    """
    with open_regular_file(file, where) as opened:
        try:
            return _entries(opened, os.fstat(opened.fileno()).st_size)
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as exc:
            reason = " ".join(str(exc).split())[:200]
            raise AdapterInvalid(
                where, [f"{file.name} is damaged or not a safetensors file ({reason})"]
            ) from exc


def header_bytes(file: Path, where: str) -> int:
    """Header length in bytes that a safetensors file declares; `read_header` checks it.

    Raises:
        AdapterInvalid: it is not a regular file.
    """
    with open_regular_file(file, where) as opened:
        return int.from_bytes(opened.read(8), "little")


def _entries(opened: BinaryIO, size: int) -> dict[str, Entry]:
    length = int.from_bytes(opened.read(8), "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise ValueError("its header is longer than the file or than allowed")
    header: Any = json.loads(opened.read(length), parse_int=_whole, object_pairs_hook=_object)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it has {len(header):,} tensors and at most {MAX_TENSORS:,} are taken")
    extents = []
    entries = {}
    for name, entry in header.items():
        shape = entry["shape"]
        (begin, end) = entry["data_offsets"]
        dtype, width = _DTYPES[entry["dtype"]]
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
            raise ValueError(
                f"tensor {name[:80]!r} has a shape that is not a list of at most {MAX_DIMENSIONS} "
                "dimensions"
            )
        if not all(type(n) is int and 0 <= n < MAX_DIMENSION for n in (*shape, begin, end)):
            raise ValueError(
                f"tensor {name[:80]!r} has a shape or an extent that is not a number below "
                f"{MAX_DIMENSION}"
            )
        if end - begin != math.prod(shape) * width:
            raise ValueError(f"tensor {name[:80]!r} has more or fewer bytes than its shape")
        extents.append((begin, end))
        entries[name] = Entry(dtype, tuple(shape))
    at = 0
    for begin, end in sorted(extents):
        if begin != at:
            raise ValueError("its tensors overlap or leave a gap")
        at = end
    if at != size - 8 - length:
        raise ValueError(
            f"it has {size - 8 - length} bytes of tensors and its header declares {at}"
        )
    return entries


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"its header has a number of {len(digits)} digits")
    return int(digits)


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(items)
    if len(held) < len(items):
        raise ValueError("its header has a key twice in one object")
    return held
