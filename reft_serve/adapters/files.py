"""Plain files of a directory: read without following links and with a cap, written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from reft_serve.errors import AdapterExists, AdapterInvalid

__all__ = ["read_plain", "sync_path", "write_directory"]


def read_plain(file: Path, max_bytes: int, where: str) -> bytes:
    """The bytes of a plain file.

    Raises:
        AdapterInvalid: it is missing, a link, a directory, a pipe, not readable, or larger than `max_bytes`; `where` is
            the adapter that the message names.
    """
    try:
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        raise AdapterInvalid(where, [f"{file.name} is missing"]) from exc
    except OSError as exc:
        link = file.is_symlink()
        fault = "is a symbolic link; copy the file itself" if link else f"cannot be read ({exc.strerror})"
        raise AdapterInvalid(where, [f"{file.name} {fault}"]) from exc
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise AdapterInvalid(where, [f"{file.name} is not a plain file"])
        if facts.st_size > max_bytes:
            raise AdapterInvalid(
                where,
                [f"{file.name} has {facts.st_size} bytes and at most {max_bytes} are taken (REFT_MAX_ADAPTER_BYTES)"],
            )
        with open(descriptor, "rb", closefd=False) as opened:
            return opened.read(max_bytes + 1)
    finally:
        os.close(descriptor)


def write_directory(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Make the directory `path` with these files so that it is there whole or not at all, even if the process dies.

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
        sync_path(aside)
        try:
            os.rename(aside, path)
        except OSError as exc:
            if exc.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise AdapterExists(f"{path} appeared while it was being written; nothing was overwritten") from exc
        sync_path(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync_path(path: Path) -> None:
    """Have a file's bytes, or a directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
