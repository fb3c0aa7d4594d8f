"""The file store: uploads, results and checkpoints by key, in a local directory or in S3. No torch.

A key exists whole or not at all: files are written to a temporary path and moved, S3 takes a
multipart upload only when it is complete. `reft_serve.adapters.store` is a different store:
versions under a path that engines see.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from reft_serve.errors import BlobMissing, RequestTooLarge, StoreUnusable
from reft_serve.storage.files import ScratchPath, fsync_path, probe_writes, sweep_scratch

__all__ = ["Blob", "BlobStore", "Written"]

_PART = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
_KEY = re.compile(rf"{_PART}(/{_PART}){{1,3}}(\.[a-z0-9]{{1,8}})?")
_PREFIX = re.compile(rf"{_PART}(/{_PART}){{0,2}}")
_CHUNK = 1 << 20
_BLOCK = 8 << 20
_ASIDE = ".writing"
_TRIES = 20
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Written:
    """Size in bytes and sha256 (hexadecimal) of a written blob."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored blob. `modified_ms`: milliseconds since 1970."""

    key: str
    size: int
    modified_ms: int


class BlobStore:
    """Blobs under one root: a directory's path (or `file://`), or `s3://BUCKET/PREFIX`, whose keys
    and endpoint come from the usual AWS_* variables.

    Keys are two to four parts of letters, digits, '-' and '_' with slashes between them, and an
    optional extension: ids that we made, never a user's words. Anything else is a ValueError.
    """

    def __init__(self, url: str) -> None:
        """Open lazily: nothing is asked of the store.

        Raises:
            StoreUnusable: a URL of another sort, or S3 without the package for it.
        """
        self._backend: _Backend = _backend(url)

    async def check(self) -> None:
        """Raise StoreUnusable if it cannot be written to."""
        key = f"checks/{os.urandom(12).hex()}"

        async def nothing() -> AsyncIterator[bytes]:
            yield b"check"

        await self.write(key, nothing(), 16)
        await self.delete(key)

    async def probe(self) -> None:
        """Write some bytes into a directory and remove them. (Nothing of S3, where each request
        costs something.)

        Raises:
            StoreUnusable: it cannot be written to.
        """
        await self._do(self._backend.probe)

    async def write(self, key: str, chunks: AsyncIterator[bytes], max_bytes: int) -> Written:
        """Store a stream under a key, replacing its previous value. After an exception nothing has
        changed.

        Raises:
            RequestTooLarge: more than `max_bytes` came.
            StoreUnusable: the store is full or cannot be reached.
        """
        _check(_KEY, key)
        size = 0
        digest = hashlib.sha256()
        writing = await self._do(self._backend.begin, key)
        try:
            async for chunk in chunks:
                size += len(chunk)
                if size > max_bytes:
                    raise RequestTooLarge(
                        f"the file has more than the {max_bytes} bytes allowed here"
                    )
                digest.update(chunk)
                await self._do(writing.write, chunk)
            await self._do(writing.commit)
        finally:
            await asyncio.shield(asyncio.to_thread(writing.discard))
        return Written(size, digest.hexdigest())

    async def read(self, key: str) -> AsyncIterator[bytes]:
        """The bytes of a key, in pieces.

        Raises:
            BlobMissing: there is no such key. StoreUnusable: the store cannot be read.
        """
        _check(_KEY, key)
        opened = await self._do(self._backend.open, key)
        try:
            while chunk := await self._do(opened.read, _CHUNK):
                yield chunk
        finally:
            opened.close()

    async def fetch(self, key: str, path: Path) -> Written:
        """Copy a key's bytes into a file, which is there only if they all came.

        Raises:
            BlobMissing: there is no such key. StoreUnusable: the store cannot be read, or `path`
                not be written.
        """
        here = _Directory(path.parent)
        writing = await self._do(here.begin_at, path)
        size = 0
        digest = hashlib.sha256()
        try:
            async for chunk in self.read(key):
                size += len(chunk)
                digest.update(chunk)
                await self._do(writing.write, chunk)
            await self._do(writing.commit)
        finally:
            await asyncio.shield(asyncio.to_thread(writing.discard))
        return Written(size, digest.hexdigest())

    async def put(self, path: Path, key: str) -> Written:
        """Copy a file's bytes under a key.

        Raises:
            StoreUnusable: the file cannot be read, or the store is full or cannot be reached.
        """
        opened: BinaryIO = await self._do(path.open, "rb")

        async def chunks() -> AsyncIterator[bytes]:
            while chunk := await self._do(opened.read, _CHUNK):
                yield chunk

        with opened:
            return await self.write(key, chunks(), 1 << 62)

    async def delete(self, key: str) -> None:
        """Remove a key; one that is not there is no fault."""
        _check(_KEY, key)
        await self._do(self._backend.delete, key)

    async def list(self, prefix: str) -> list[Blob]:
        """The blobs below `prefix/`, by key. (`prefix` is one to three whole parts of keys.)"""
        _check(_PREFIX, prefix)
        return sorted(await self._do(self._backend.list, prefix), key=lambda blob: blob.key)

    async def sweep(self) -> None:
        """Remove what processes that died left half written. (In S3 a lifecycle rule of the bucket
        does that.)
        """
        await self._do(self._backend.sweep)

    async def _do(self, work: Callable[..., T], *given: Any) -> T:
        """Run blocking work in a thread and translate its errors."""
        try:
            return await asyncio.to_thread(work, *given)
        except self._backend.failures as exc:
            reason = (
                getattr(exc, "strerror", None)
                or " ".join(str(exc).split())[:200]
                or type(exc).__name__
            )
            raise StoreUnusable(f"the file store cannot be used ({reason})") from exc


class _Writing(Protocol):
    """Bytes on their way. `discard` after `commit` changes nothing; without it nothing was
    written.
    """

    def write(self, chunk: bytes, /) -> object: ...

    def commit(self) -> None: ...

    def discard(self) -> None: ...


class _Backend(Protocol):
    """Where blobs lie. Every method blocks."""

    failures: tuple[type[Exception], ...]

    def begin(self, key: str) -> _Writing: ...

    def open(self, key: str) -> BinaryIO: ...

    def delete(self, key: str) -> None: ...

    def list(self, prefix: str) -> list[Blob]: ...

    def sweep(self) -> None: ...

    def probe(self) -> None: ...


class _Directory:
    """A directory of this machine, or one that several machines share."""

    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, root: Path) -> None:
        self._root = root
        self._asides = root / _ASIDE

    def begin(self, key: str) -> _Writing:
        return self.begin_at(self._root / key)

    def begin_at(self, target: Path) -> _Writing:
        return _File(ScratchPath.file(self._asides), target, self._asides)

    def open(self, key: str) -> BinaryIO:
        with _missing_translated():
            return (self._root / key).open("rb")

    def delete(self, key: str) -> None:
        target = self._root / key
        target.unlink(missing_ok=True)
        for folder in list(target.parents)[: key.count("/")]:
            try:
                folder.rmdir()
            except OSError:  # others are in it
                return

    def list(self, prefix: str) -> list[Blob]:
        blobs = []
        for folder, _, names in os.walk(self._root / prefix):
            for name in names:
                path = Path(folder, name)
                try:
                    facts = path.stat()
                except FileNotFoundError:  # removed in this moment
                    continue
                key = path.relative_to(self._root).as_posix()
                blobs.append(Blob(key, facts.st_size, facts.st_mtime_ns // 1_000_000))
        return blobs

    def sweep(self) -> None:
        sweep_scratch(self._asides)

    def probe(self) -> None:
        probe_writes(self._asides)


class _File:
    """A file written aside, then moved to its place."""

    def __init__(self, aside: ScratchPath, target: Path, asides: Path) -> None:
        self._aside = aside
        self._target = target
        self._asides = asides
        self._opened = open(aside.path, "wb")  # noqa: SIM115 - it is closed by commit or discard
        self.write = self._opened.write

    def commit(self) -> None:
        self._opened.flush()
        os.fsync(self._opened.fileno())
        for left in reversed(range(_TRIES)):
            try:
                self._target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(self._aside.path, self._target)
                break
            # the folder was removed with its last file in this moment
            except (FileNotFoundError, FileExistsError):
                if not left:
                    raise
        fsync_path(self._target.parent)

    def discard(self) -> None:
        with suppress(OSError):  # a full disk, told by `write` already
            self._opened.close()
        self._aside.remove()


class _Bucket:
    """A bucket of S3 or a compatible service, and a prefix in it."""

    def __init__(self, root: str, files: Any, failures: tuple[type[Exception], ...]) -> None:
        self._root = root
        self._files = files
        self.failures = failures

    def begin(self, key: str) -> _Writing:
        return _Multipart(
            self._files.open(f"{self._root}/{key}", "wb", block_size=_BLOCK, autocommit=False)
        )

    def open(self, key: str) -> BinaryIO:
        with _missing_translated():
            opened: BinaryIO = self._files.open(f"{self._root}/{key}", "rb", block_size=_BLOCK)
            return opened

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{key}")

    def list(self, prefix: str) -> list[Blob]:
        entries = self._files.find(f"{self._root}/{prefix}/", detail=True)
        return [
            Blob(
                path.removeprefix(f"{self._root}/"),
                facts["size"],
                int(facts["LastModified"].timestamp() * 1000),
            )
            for path, facts in entries.items()
        ]

    def sweep(self) -> None:
        """Nothing to do: incomplete multipart uploads are invisible."""

    def probe(self) -> None:
        pass


class _Multipart:
    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self._committed = False
        self.write = opened.write

    def commit(self) -> None:
        self._opened.close()
        self._opened.commit()
        self._committed = True

    def discard(self) -> None:
        if self._committed:
            return
        self._opened.closed = True  # else it would be sent when Python collects it
        # what cannot be taken back now, the bucket's lifecycle rule removes
        with suppress(Exception):
            self._opened.discard()


def _backend(url: str) -> _Backend:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        return _Directory(Path(rest if separator else url).expanduser().resolve())
    if scheme != "s3":
        raise StoreUnusable(
            f"the file store {scheme[:20]}:// is not known: give a directory or s3://BUCKET/PREFIX"
        )
    try:
        import s3fs
        from aiohttp import ClientError as HttpError
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as exc:
        raise StoreUnusable(
            "an S3 file store needs a package: pip install 'reft-serve[s3]'"
        ) from exc
    patience = {
        "connect_timeout": 5,
        "read_timeout": 30,
        "retries": {"max_attempts": 3, "mode": "standard"},
    }
    files = s3fs.S3FileSystem(
        config_kwargs=patience, use_listings_cache=False, skip_instance_cache=True
    )
    return _Bucket(
        rest.strip("/"), files, (OSError, BotoCoreError, ClientError, HttpError, TimeoutError)
    )


@contextmanager
def _missing_translated() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as exc:
        raise BlobMissing("a file is missing from the file store") from exc


def _check(pattern: re.Pattern[str], key: str) -> None:
    if not pattern.fullmatch(key):
        raise ValueError("not a key of the file store")
