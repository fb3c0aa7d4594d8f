"""From what a caller uploads to a staged directory with an adapter's files in it, and nothing else.

Nothing that an archive says is believed: only plain files of known names are taken, wherever it says that they lie, and
never more bytes than are allowed, whatever sizes it declares.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from fastapi import UploadFile

from reft_serve.adapters.structure import FILES
from reft_serve.errors import RequestInvalid, RequestTooLarge

__all__ = ["unpack"]

_CHUNK = 1 << 20
_MOST_MEMBERS = 64
_TAR = (".tar", ".tar.gz", ".tgz")


def unpack(uploads: list[UploadFile], into: Path, max_bytes: int) -> int:
    """Write the files of an upload (single ones, or those of one archive) into a directory, and give their size. Blocks.

    Raises:
        RequestInvalid: a file that does not belong to an adapter, one that is there twice, or a damaged archive.
        RequestTooLarge: together they have more than `max_bytes`.
    """
    taken = 0
    for upload in uploads:
        for name, content in _files(upload):
            target = into / name
            if target.exists():
                raise RequestInvalid(f"{name} is there twice", "files")
            taken += _copy(content, target, max_bytes - taken)
    return taken


def _files(upload: UploadFile) -> Iterator[tuple[str, IO[bytes]]]:
    name = upload.filename or ""
    content = upload.file
    if name in FILES:
        yield name, content
    elif name.endswith(".zip"):
        yield from _unzipped(content)
    elif name.endswith(_TAR):
        yield from _untarred(content)
    else:
        raise RequestInvalid(
            f"{name[:80]!r} is no file of an adapter: give {', '.join(FILES[:2])} (and {', '.join(FILES[2:])}), or one "
            ".tar, .tar.gz or .zip with them",
            "files",
        )


def _untarred(content: BinaryIO) -> Iterator[tuple[str, IO[bytes]]]:
    try:
        with tarfile.open(fileobj=content, mode="r:*") as archive:
            for count, member in enumerate(archive):
                if member.isdir():
                    continue
                name = _member(member.name, count)
                opened = archive.extractfile(member) if member.isreg() else None
                if opened is None:
                    raise RequestInvalid(f"{name} of the archive is a link or a device, not a plain file", "files")
                yield name, opened
    except (tarfile.TarError, EOFError, OSError, ValueError) as exc:
        _damaged(exc)


def _unzipped(content: BinaryIO) -> Iterator[tuple[str, IO[bytes]]]:
    try:
        with zipfile.ZipFile(content) as archive:
            for count, member in enumerate(archive.infolist()):
                if member.is_dir():
                    continue
                name = _member(member.filename, count)
                if (member.external_attr >> 16) & 0o170000 not in (0, 0o100000):
                    raise RequestInvalid(f"{name} of the archive is a link or a device, not a plain file", "files")
                with archive.open(member) as opened:
                    yield name, opened
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as exc:
        _damaged(exc)


def _member(path: str, count: int) -> str:
    if count >= _MOST_MEMBERS:
        raise RequestInvalid(f"the archive has more than {_MOST_MEMBERS} members", "files")
    parts = PurePosixPath(path.replace("\\", "/")).parts
    inside = [part for part in parts if part != "."]
    if not inside or inside[-1] not in FILES or len(inside) > 2 or ".." in inside or inside[0] == "/":
        raise RequestInvalid(
            f"{path[:80]!r} of the archive is no file of an adapter; {', '.join(FILES)} are, at its top or in one directory",
            "files",
        )
    return inside[-1]


def _damaged(exc: Exception) -> None:
    if isinstance(exc, (RequestInvalid, RequestTooLarge)):
        raise exc
    reason = " ".join(str(exc).split())[:200]
    raise RequestInvalid(f"the archive cannot be read ({reason})", "files") from exc


def _copy(content: IO[bytes], target: Path, room: int) -> int:
    size = 0
    with target.open("xb") as file:
        while chunk := content.read(_CHUNK):
            size += len(chunk)
            if size > room:
                raise RequestTooLarge("the adapter's files have more bytes than are taken here")
            file.write(chunk)
    return size
