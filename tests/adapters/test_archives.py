"""Archives as people's tools make them are unpacked; archives made to cost much are refused at once."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from reft_serve.adapters.archives import IGNORED, MAX_ARCHIVE_MEMBERS, unpack_archive
from reft_serve.errors import RequestInvalid, RequestTooLarge, StoreUnusable
from tests.support.adapters.archives import tar_of, zip_of
from tests.support.gateway.harness import adapter_files

GOOD = adapter_files()
MARKS = {"__MACOSX/._reft_config.json": b"\0" * 10, "._reft_config.json": b"x", ".DS_Store": b"x", "README.md": b"# A",
         ".gitattributes": b"x", "training_args.bin": b"not read"}  # fmt: skip


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}{name}": content for name, content in files.items()}


def with_folders(folder: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(f"{folder}/", b"")
        for name, content in GOOD.items():
            archive.writestr(f"{folder}/{name}", content)
    return packed.getvalue()


def pax(**headers: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in GOOD.items():
            facts = tarfile.TarInfo(f"./run/{name}")
            facts.size, facts.pax_headers = len(content), headers
            archive.addfile(facts, io.BytesIO(content))
    return packed.getvalue()


SOUND = {
    "macOS's zip": ("birds.zip", zip_of(below("birds/", GOOD) | below("birds/", MARKS) | MARKS)),
    "Windows's zip": (
        "birds.ZIP",
        zip_of(below("birds\\", GOOD) | {"birds\\": b"", "birds\\Thumbs.db": b"x"}),
    ),
    "a zip with folders": ("birds.zip", with_folders("birds")),
    "a hub's folder": ("birds.tar", tar_of(below("./birds/", GOOD | MARKS))),
    "extended headers": (
        "birds.tar",
        pax(mtime="1700000000.5", **{"LIBARCHIVE.xattr.com.apple.provenance": "A" * 4000}),
    ),
    "bzip2": ("birds.tar.bz2", bz2.compress(tar_of(GOOD))),
    "xz": ("birds.tar.xz", lzma.compress(tar_of(GOOD))),
    "gzip under another name": ("birds.tar", gzip.compress(tar_of(GOOD))),
}


@pytest.mark.parametrize("case", SOUND)
def test_an_archive_as_a_tool_makes_it_is_unpacked(case: str, tmp_path: Path) -> None:
    name, content = SOUND[case]
    assert unpack_archive(io.BytesIO(content), name, tmp_path, 1 << 20) == sum(
        map(len, GOOD.values())
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == GOOD


def test_every_ignored_file_is_passed_over(tmp_path: Path) -> None:
    content = tar_of(GOOD | dict.fromkeys(IGNORED, b"x"))
    unpack_archive(io.BytesIO(content), "a.tar", tmp_path, 1 << 20)
    assert {path.name for path in tmp_path.iterdir()} == set(GOOD)


def long_header(kind: bytes, size: int) -> bytes:
    head = tarfile.TarInfo("././@LongLink")
    head.type, head.size = kind, size
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb") as packed:
        packed.write(head.tobuf(tarfile.GNU_FORMAT))
        for _ in range(size >> 20):
            packed.write(bytes(1 << 20))
    return out.getvalue()


def chained_headers() -> bytes:
    head = tarfile.TarInfo("././@LongLink")
    head.type, head.size = b"L", 512
    return (head.tobuf(tarfile.GNU_FORMAT) + b"a" * 512) * 5000


def pax_lines(line: bytes, count: int) -> bytes:
    head = tarfile.TarInfo("x")
    head.type, head.size = b"x", len(line) * count
    return head.tobuf(tarfile.GNU_FORMAT) + (line * count).ljust(
        -(-len(line) * count // 512) * -512, b"\0"
    )


def sparse() -> bytes:
    head = bytearray(tarfile.TarInfo("reft_config.json").tobuf(tarfile.GNU_FORMAT))
    head[156:157], head[482:483] = b"S", b"\1"
    head[148:156] = b"%06o\0 " % (256 + sum(head[:148]) + sum(head[156:512]))
    return bytes(head) + (bytes(504) + b"\1" + bytes(7)) * 20_000


def many(kind: str) -> bytes:
    files = {f"folder{i}/": b"" for i in range(MAX_ARCHIVE_MEMBERS + 1)} | GOOD
    return (
        zip_of(files)
        if kind == "zip"
        else tar_of(dict.fromkeys((f"._{i}" for i in range(300)), b"") | GOOD)
    )


def without_end(content: bytes) -> bytes:
    return content[: len(content) // 2]


def zip64_lie() -> bytes:
    content = bytearray(zip_of(GOOD))
    at = content.rindex(b"PK\5\6")
    struct.pack_into("<HHII", content, at + 8, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    return bytes(content)


COSTLY = {
    "a GNU name of 128 MiB": ("a.tar.gz", lambda: long_header(b"L", 128 << 20)),
    "a PAX header of 64 MiB": ("a.tar.gz", lambda: long_header(b"x", 64 << 20)),
    "a global PAX header of 64 MiB": ("a.tar.gz", lambda: long_header(b"g", 64 << 20)),
    "a chain of long names": ("a.tar", chained_headers),
    "a PAX header of many short lines": ("a.tar", lambda: pax_lines(b"2 ", 16_000)),
    "a sparse file": ("a.tar", sparse),
    "many ignored files": ("a.tar", lambda: many("tar")),
    "many folders": ("a.zip", lambda: many("zip")),
    "a directory of many folders": ("a.zip", lambda: zip_of({f"folder{i}/": b"" for i in range(10_000)})),
    "a zip64 that lies": ("a.zip", zip64_lie),
    "half a zip": ("a.zip", lambda: without_end(zip_of(GOOD))),
    "half a gzip": ("a.tgz", lambda: without_end(gzip.compress(tar_of(GOOD)))),
    "half an xz": ("a.txz", lambda: without_end(lzma.compress(tar_of(GOOD)))),
    "twice in two folders": ("a.tar", lambda: tar_of(below("a/", GOOD) | below("b/", GOOD))),
    "nothing": ("a.tar", lambda: b""),
    "an archive in an archive": ("a.tar", lambda: tar_of({"a.tar": tar_of(GOOD)})),
}  # fmt: skip


@pytest.mark.parametrize("case", COSTLY)
def test_a_costly_or_damaged_archive_is_refused_cheaply(case: str, tmp_path: Path) -> None:
    name, make = COSTLY[case]
    content, started = make(), time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(RequestInvalid) as caught:
            unpack_archive(io.BytesIO(content), name, tmp_path, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.bz2", "a.tar.xz", "a.zip"])
def test_no_more_is_written_than_is_taken(name: str, tmp_path: Path) -> None:
    files = GOOD | {"reft_model.safetensors": bytes(8_000_000)}
    packers = {"a.tar.gz": gzip.compress, "a.tar.bz2": bz2.compress, "a.tar.xz": lzma.compress}
    content = packers[name](tar_of(files)) if name in packers else zip_of(files)
    with pytest.raises(RequestTooLarge):
        unpack_archive(io.BytesIO(content), name, tmp_path, 1 << 20)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1 << 20


def test_a_directory_that_cannot_be_written_to_is_the_stores_failure(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable):
        unpack_archive(io.BytesIO(tar_of(GOOD)), "a.tar", tmp_path / "gone", 1 << 20)
