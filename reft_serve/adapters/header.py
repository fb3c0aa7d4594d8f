"""The header of a safetensors file, read without torch: each tensor's name, dtype and shape, and that the bytes fit them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from reft_serve.adapters.files import open_plain
from reft_serve.errors import AdapterInvalid

__all__ = ["Entry", "read_header"]

_MAX_HEADER_BYTES = 16 << 20
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
    """What a header says of a tensor; `dtype` as torch calls it, for instance float32."""

    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path, where: str) -> dict[str, Entry]:
    """The entries of a safetensors file whose tensors lie side by side, to its last byte.

    Raises:
        AdapterInvalid: it is no plain file, damaged, or another kind of file; `where` is the adapter that the message names.
    """
    with open_plain(file, where) as opened:
        try:
            return _entries(opened, os.fstat(opened.fileno()).st_size)
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as exc:
            reason = " ".join(str(exc).split())[:200]
            raise AdapterInvalid(where, [f"{file.name} is damaged or not a safetensors file ({reason})"]) from exc


def _entries(opened: BinaryIO, size: int) -> dict[str, Entry]:
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
        dtype, width = _DTYPES[entry["dtype"]]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError(f"tensor {name[:80]!r} has a shape or an extent that is no number")
        if end - begin != math.prod(shape) * width:
            raise ValueError(f"tensor {name[:80]!r} has more or fewer bytes than its shape")
        extents.append((begin, end))
        entries[name] = Entry(dtype, shape)
    at = 0
    for begin, end in sorted(extents):
        if begin != at:
            raise ValueError("its tensors overlap or leave a gap")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"it has {size - 8 - length} bytes of tensors and its header tells of {at}")
    return entries
