"""Archives, adapters and data files that are large, damaged or made to cost much: each is made when
it is called for.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable, Mapping

__all__ = ["archives", "damaged_adapters", "data_files"]

_MIB = 1 << 20


def archives(
    rng: random.Random, adapter: Mapping[str, bytes]
) -> list[Callable[[], tuple[str, bytes]]]:
    """(name, content) of an archive."""
    size = rng.choice((1, 16, 64)) * _MIB
    return [
        lambda: ("x.tar.gz", _tar_header(b"L", size)),
        lambda: ("x.tar.gz", _tar_header(b"x", size)),
        lambda: ("x.tar.gz", gzip.compress(bytes(size), 1)),
        lambda: ("x.zip", _zip({"reft_config.json": bytes(size)})),
        lambda: (
            "x.zip",
            _zip(dict.fromkeys((f"d{k}/" for k in range(rng.choice((100, 20_000)))), b"")),
        ),
        lambda: ("x.zip", _zip({"../x": b"x", "/etc/x": b"x", **adapter})),
        lambda: ("x.tar", _tar({"../x": b"x", **adapter})),
        lambda: ("x.tar", _damaged(rng, _tar(adapter))),
        lambda: ("x.zip", _damaged(rng, _zip(adapter))),
        lambda: ("x.tar.gz", _damaged(rng, gzip.compress(_tar(adapter)))),
        lambda: ("x.zip", _zip(adapter)[: rng.randrange(200)]),
    ]


def damaged_adapters(
    rng: random.Random, adapter: Mapping[str, bytes]
) -> list[Callable[[], dict[str, bytes]]]:
    """The files of an adapter."""
    count = rng.choice((10, 1_000, 100_000))
    header = {"__metadata__": {}} | {
        f"t{k}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(count)
    }
    numbers = (
        b'{"x":{"dtype":"F32","shape":['
        + b",".join([b"9" * 4_000] * min(count, 700))
        + b'],"data_offsets":[0,0]}}'
    )
    return [
        lambda: {**adapter, "reft_config.json": b'{"interventions":[' + b"{}," * count + b"{}]}"},
        lambda: {**adapter, "reft_config.json": b"[" * count},
        lambda: {**adapter, "reft_config.json": b'{"format_version":' + b"9" * count + b"}"},
        lambda: {**adapter, "reft_model.safetensors": _safetensors(json.dumps(header).encode())},
        lambda: {**adapter, "reft_model.safetensors": _safetensors(numbers)},
        lambda: {**adapter, "reft_model.safetensors": b"\xff" * 8 + b"{}"},
        lambda: {**adapter, "reft_model.safetensors": _safetensors(b"[" * count)},
        lambda: {name: _damaged(rng, content) for name, content in adapter.items()},
        lambda: {name: content[: rng.randrange(len(content))] for name, content in adapter.items()},
        lambda: {f"part-{k}": b"x" for k in range(min(count, 100))},
    ]


def data_files(rng: random.Random) -> list[Callable[[], bytes]]:
    """A data file of a fine-tuning job."""
    count = rng.choice((10, 1_000, 50_000))
    row = b'{"prompt":"a","completion":"b"}'
    return [
        lambda: b"{" + b",".join(b'"k%d":1' % k for k in range(count)) + b"}\n",
        lambda: b"[" + b",".join([row] * count) + b"]",
        lambda: row * count,
        lambda: b"{}\n" * count,
        lambda: b"[" * count,
        lambda: b'{"prompt":"' + b"a" * count * 20 + b'","completion":"b"}\n',
        lambda: b'{"messages":[' + b'{"role":"user","content":"a"},' * count + b"{}]}\n",
        lambda: (
            b'{"messages":[],"tools":'
            + b'{"a":' * min(count, 5_000)
            + b"1"
            + b"}" * min(count, 5_000)
            + b"}\n"
        ),
        lambda: _damaged(rng, (row + b"\n") * 50),
        lambda: bytes(count),
    ]


def _damaged(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randrange(1, 8)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def _tar_header(kind: bytes, size: int) -> bytes:
    """A header whose own data, a long name or PAX records, is of that size."""
    head = tarfile.TarInfo("././@LongLink")
    head.type, head.size = kind, size
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as packed:
        packed.write(head.tobuf(tarfile.GNU_FORMAT))
        for _ in range(size // _MIB):
            packed.write(bytes(_MIB))
    return out.getvalue()


def _tar(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def _zip(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()
