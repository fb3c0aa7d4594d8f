"""The file store: whole or not at all, in a directory and in S3, whatever happens on the way."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from reft_serve.adapters.store import AdapterStore
from reft_serve.errors import BlobMissing, RequestTooLarge, StoreUnusable
from reft_serve.storage.blobs import BlobStore
from reft_serve.storage.files import ScratchPath, sweep_scratch
from tests.support.buckets import s3_bucket

pytestmark = pytest.mark.anyio
BIG = os.urandom(9 << 20)  # more than one part of a multipart upload


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as url:
        yield url


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "directory":
        return BlobStore(str(tmp_path / "blobs"))
    return BlobStore(f"{request.getfixturevalue('bucket')}/{tmp_path.name.replace('_', '')}")


async def pieces(content: bytes, fail: Exception | None = None) -> AsyncIterator[bytes]:
    for at in range(0, len(content), 1 << 20):
        yield content[at : at + (1 << 20)]
    if fail is not None:
        raise fail


async def read(store: BlobStore, key: str) -> bytes:
    return b"".join([chunk async for chunk in store.read(key)])


@pytest.mark.parametrize("content", [b"", b"x", BIG], ids=["empty", "one", "big"])
async def test_what_is_written_is_read(store: BlobStore, content: bytes, tmp_path: Path) -> None:
    written = await store.write("files/file-1", pieces(content), len(content))
    assert (written.size, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert await read(store, "files/file-1") == content
    assert await store.fetch("files/file-1", tmp_path / "copy") == written
    assert (tmp_path / "copy").read_bytes() == content
    assert await store.put(tmp_path / "copy", "files/file-2") == written
    assert [(blob.key, blob.size) for blob in await store.list("files")] == [
        ("files/file-1", len(content)), ("files/file-2", len(content))
    ]  # fmt: skip
    await store.delete("files/file-1")
    await store.delete("files/file-1")
    assert [blob.key for blob in await store.list("files")] == ["files/file-2"]
    await store.check()


async def test_a_write_that_fails_changes_nothing(store: BlobStore) -> None:
    await store.write("files/a/b.tar", pieces(b"before"), 6)
    with pytest.raises(RequestTooLarge, match="more than the 100 bytes"):
        await store.write("files/a/b.tar", pieces(BIG), 100)
    with pytest.raises(RequestTooLarge):
        await store.write("files/new", pieces(BIG), len(BIG) - 1)
    with pytest.raises(ZeroDivisionError):
        await store.write("files/new", pieces(BIG, ZeroDivisionError()), 1 << 30)
    assert await read(store, "files/a/b.tar") == b"before"
    assert [blob.key for blob in await store.list("files")] == ["files/a/b.tar"]


async def test_what_is_not_there_is_said(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(BlobMissing, match="missing from the file store"):
        await read(store, "files/none")
    with pytest.raises(BlobMissing):
        await store.fetch("files/none", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert await store.list("files") == []


@pytest.mark.parametrize(
    "key",
    [
        "", "a", "../a/b", "a/../b", "/a/b", "a//b", "a/b/", "a/.b", "a/b\n", "a/b c", "a/b.TAR", "a/b.c/d", "a/b/c/d/e",
        "é/a", "a/" + "x" * 65, "a\\b/c", "a/b\0",
    ],
)  # fmt: skip
async def test_a_key_is_ours_or_refused(store: BlobStore, key: str) -> None:
    for action in (
        store.write(key, pieces(b""), 1),
        read(store, key),
        store.delete(key),
        store.list(f"{key}/.."),
    ):
        with pytest.raises(ValueError, match="not a key"):
            await action


async def test_writers_of_one_key_leave_one_whole_content(store: BlobStore) -> None:
    contents = [bytes([k]) * (2 << 20) for k in range(4)]
    await asyncio.gather(
        *(store.write("files/one", pieces(content), 1 << 30) for content in contents)
    )
    assert await read(store, "files/one") in contents


async def test_deleting_a_folders_last_file_does_not_disturb_a_writer(tmp_path: Path) -> None:
    store = BlobStore(str(tmp_path))

    async def churn(key: str) -> None:
        for _ in range(100):
            await store.write(key, pieces(b"x"), 1)
            await store.delete(key)

    await asyncio.gather(*(churn(f"jobs/same/{k}") for k in range(3)))
    assert not (tmp_path / "jobs").exists()


async def test_a_place_that_cannot_be_written_to_is_said() -> None:
    with pytest.raises(StoreUnusable, match="cannot be used"):
        await BlobStore("/proc/blobs").check()


def test_a_disk_that_is_full_in_the_middle_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
import asyncio, resource, signal
from reft_serve.storage.blobs import BlobStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
async def chunks():
    for _ in range(4):
        yield bytes(1 << 19)
asyncio.run(BlobStore({str(tmp_path / "blobs")!r}).write("files/x", chunks(), 1 << 30))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert "StoreUnusable: the file store cannot be used (File too large)" in ended.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_a_bucket_that_is_not_there_is_said(bucket: str) -> None:
    with pytest.raises(StoreUnusable, match="cannot be used"):
        await BlobStore("s3://nobodys/prefix").check()


async def test_an_endpoint_that_does_not_answer_is_said(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreUnusable, match="cannot be used"):
        await BlobStore(bucket).list("files")


def test_another_sort_of_place_is_refused() -> None:
    with pytest.raises(StoreUnusable, match="give a directory or s3://"):
        BlobStore("ftp://host/x")


async def test_what_a_killed_writer_left_is_swept_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    code = f"""
import sys, time
from pathlib import Path
from reft_serve.storage.files import ScratchPath
aside = ScratchPath.file(Path({str(tmp_path / ".writing")!r}))
aside.path.write_bytes(b"half")
folder = ScratchPath.directory(Path({str(tmp_path / ".staging")!r}))
(folder.path / "file").write_bytes(b"half")
print("ready", flush=True)
time.sleep(60)
"""
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert killed.stdout is not None
    assert killed.stdout.readline() == b"ready\n"
    living = ScratchPath.file(tmp_path / ".writing")
    store, versions = BlobStore(str(tmp_path)), AdapterStore(tmp_path)
    await store.sweep()
    versions.sweep()
    assert len(list(tmp_path.glob(".*/*"))) == 3
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    await store.sweep()
    versions.sweep()
    assert list(tmp_path.glob(".*/*")) == [living.path]
    living.remove()
    sweep_scratch(tmp_path / ".writing")
    assert not list(tmp_path.glob(".*/*"))
