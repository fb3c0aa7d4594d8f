"""Plain files of a directory: read without following links and with a cap, written whole or not at
all.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Self

from reft_serve.errors import AdapterExists, AdapterInvalid

__all__ = [
    "NO_SPACE",
    "ScratchPath",
    "fsync_path",
    "open_regular_file",
    "probe_writes",
    "read_regular_file",
    "sweep_scratch",
    "write_directory",
]

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
"""Errors of a full disk."""
_PROBE_BYTES = 4096


@contextmanager
def open_regular_file(file: Path, where: str, max_bytes: int | None = None) -> Iterator[BinaryIO]:
    """A regular file, opened to be read.

    Raises:
        AdapterInvalid: it is missing, a link, a directory, a pipe, not readable, or larger than
            `max_bytes`; `where` is the adapter that the message names.
    """
    try:
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        raise AdapterInvalid(where, [f"{file.name} is missing"]) from exc
    except OSError as exc:
        link = file.is_symlink()
        fault = (
            "is a symbolic link; copy the file itself"
            if link
            else f"cannot be read ({exc.strerror})"
        )
        raise AdapterInvalid(where, [f"{file.name} {fault}"]) from exc
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise AdapterInvalid(where, [f"{file.name} is not a regular file"])
        if max_bytes is not None and facts.st_size > max_bytes:
            raise AdapterInvalid(
                where,
                [
                    f"{file.name} has {facts.st_size} bytes and at most {max_bytes} are taken "
                    "(REFT_MAX_ADAPTER_BYTES)"
                ],
            )
        with open(descriptor, "rb", closefd=False) as opened:
            yield opened
    finally:
        os.close(descriptor)


def read_regular_file(file: Path, max_bytes: int, where: str) -> bytes:
    """The bytes of a regular file of at most `max_bytes`. Raises AdapterInvalid as
    `open_regular_file` does.
    """
    with open_regular_file(file, where, max_bytes) as opened:
        return opened.read(max_bytes + 1)


def write_directory(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Make the directory `path` with these files so that it is there whole or not at all, even if
    the process dies.

    Raises:
        AdapterExists: something is at `path` already; nothing was overwritten.
    """
    if os.path.lexists(path):
        raise AdapterExists(f"{path} already exists; choose another --out or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        aside.mkdir()
        for name, content in files:
            with open(aside / name, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        fsync_path(aside)
        try:
            os.rename(aside, path)
        except OSError as exc:
            if exc.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise AdapterExists(
                f"{path} was created by another process in the meantime; nothing was overwritten"
            ) from exc
        fsync_path(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Have a file's bytes, or a directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ScratchPath:
    """A temporary file or directory under a random name, locked by its process: files of a dead
    process are recognised, on any machine, by the missing lock.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def file(cls, folder: Path) -> Self:
        """A new, empty file in `folder`, which is made if it is not there."""
        return cls._created(folder, os.O_CREAT | os.O_EXCL | os.O_WRONLY)

    @classmethod
    def directory(cls, folder: Path) -> Self:
        """A new, empty directory in `folder`."""
        return cls._created(folder, os.O_DIRECTORY | os.O_RDONLY)

    @classmethod
    def _created(cls, folder: Path, flags: int) -> Self:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / secrets.token_hex(12)
            if flags & os.O_DIRECTORY:
                path.mkdir()
            descriptor = os.open(path, flags, 0o600)
            if _lock(descriptor) and path.exists():  # else a sweep was faster
                return cls(path, descriptor)
            os.close(descriptor)

    def remove(self) -> None:
        """Remove it, if it was not moved elsewhere, and let the lock go."""
        if self._descriptor < 0:
            return
        _remove(self.path)
        os.close(self._descriptor)
        self._descriptor = -1


def probe_writes(folder: Path) -> None:
    """Write some bytes into a new file of a folder, and remove it. Raises OSError if that cannot be
    done.
    """
    aside = ScratchPath.file(folder)
    try:
        with open(aside.path, "wb") as file:
            file.write(b"\0" * _PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    finally:
        aside.remove()


def sweep_scratch(folder: Path) -> None:
    """Remove the asides in a folder whose processes have ended."""
    try:
        entries = list(folder.iterdir())
    except FileNotFoundError:
        return
    for path in entries:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # gone in this moment
            continue
        try:
            if _lock(descriptor):
                _remove(path)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
