"""An archive of an adapter's files, unpacked into a directory: those files, and nothing else. No
torch.

Archives are not trusted: only regular files of known names are extracted, regardless of their
paths, and never more bytes than are allowed, regardless of declared sizes. Call it in a process
with limits: tarfile and zipfile read a header whole before it can be checked.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, Final, NoReturn

from reft_serve.adapters.structure import FILES
from reft_serve.errors import RequestInvalid, RequestTooLarge, StoreUnusable

__all__ = [
    "IGNORED",
    "MAX_ARCHIVE_MEMBERS",
    "MAX_MEMBER_HEADER_BYTES",
    "MAX_ZIP_DIRECTORY_BYTES",
    "copy_file",
    "is_archive",
    "is_ignored",
    "unpack_archive",
]

MAX_ARCHIVE_MEMBERS = 256
MAX_MEMBER_HEADER_BYTES = 32 << 10
# Of the directory at a zip's end, with what is read to find it.
MAX_ZIP_DIRECTORY_BYTES = 256 << 10
# Files that the makers of archives and of adapters add; they are passed over unread. Compared in
# lower case.
IGNORED: Final = frozenset(
    {
        *(
            ".ds_store",
            "thumbs.db",
            "desktop.ini",
            ".gitattributes",
            ".gitignore",
            "readme.md",
            "license",
            "license.txt",
        ),
        *("license.md", "training_args.bin", "trainer_state.json"),
    }
)
_ZIP = (".zip",)
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_CHUNK = 1 << 20
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, OSError, ValueError, NotImplementedError, RuntimeError, LookupError, OverflowError),
)
_UNPACKERS: tuple[tuple[bytes, Callable[[Any], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
)


def is_archive(name: str) -> bool:
    """True if the file name has an archive's extension."""
    return name.lower().endswith(_ZIP + _TAR)


def is_ignored(path: str) -> bool:
    """True for files to skip: those that macOS and Windows add, and files that lie next to an
    adapter on a hub.
    """
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return bool(parts) and (
        "__MACOSX" in parts or parts[-1].startswith("._") or parts[-1].lower() in IGNORED
    )


def unpack_archive(content: BinaryIO, name: str, into: Path, max_bytes: int) -> int:
    """Write an archive's files into a directory, and return their size.

    Args:
        content: the archive, which can be sought in.
        name: its file name, which says what kind it is.
        into: the directory.
        max_bytes: most bytes of the files together.

    Raises:
        RequestInvalid: a file that does not belong to an adapter, one that appears twice, or a
            damaged archive.
        RequestTooLarge: the files have more than `max_bytes`.
        StoreUnusable: the directory cannot be written to.
    """
    taken = 0
    members = _unzipped(content) if name.lower().endswith(_ZIP) else _untarred(content)
    for member, opened in members:
        taken += copy_file(opened, into, member, max_bytes - taken)
    return taken


def copy_file(content: IO[bytes], into: Path, name: str, room: int) -> int:
    """Write one file into a directory, and return its size.

    Raises:
        RequestInvalid: a file of this name is there, or the content cannot be read.
        RequestTooLarge: it has more than `room` bytes.
        StoreUnusable: the directory cannot be written to.
    """
    size = 0
    try:
        with (into / name).open("xb") as file:
            while chunk := _read(content):
                size += len(chunk)
                if size > room:
                    raise RequestTooLarge("the adapter's files exceed the size limit")
                file.write(chunk)
    except FileExistsError as exc:
        raise RequestInvalid(f"{name} appears twice in the upload", "files") from exc
    except OSError as exc:
        raise StoreUnusable(f"the adapter store cannot be written to ({exc.strerror})") from exc
    return size


def _read(content: IO[bytes]) -> bytes:
    try:
        return content.read(_CHUNK)
    except _DAMAGE as exc:
        _damaged(exc)


class _Metered:
    """A file of which a bounded number of bytes can be read, until the bound is set again."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.left = float(MAX_ZIP_DIRECTORY_BYTES)
        self.seek = file.seek
        self.tell = file.tell
        self.close = file.close
        self.seekable = file.seekable

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes; all that are left may be asked for as long as they are few."""
        asked = -1 if size is None else size
        content: bytes = self._file.read(asked if 0 <= asked <= self.left else _least(self.left))
        self.left -= len(content)
        if self.left < 0:
            raise RequestInvalid(
                "the archive has a header, or a directory, that is too long", "files"
            )
        return content


def _least(left: float) -> int:
    """Number of bytes to read so that an excess over the remaining limit is noticed."""
    return -1 if math.isinf(left) else max(int(left), 0) + 1


def _untarred(content: BinaryIO) -> Iterator[tuple[str, IO[bytes]]]:
    magic = content.read(6)
    content.seek(0)
    unpacker = next((kind for start, kind in _UNPACKERS if magic.startswith(start)), None)
    file = _Metered(content if unpacker is None else unpacker(content))
    try:
        file.left = MAX_MEMBER_HEADER_BYTES
        with tarfile.open(fileobj=file, mode="r:") as archive:  # type: ignore[call-overload]
            for count, member in enumerate(archive):
                _check_count(count)
                if not member.isdir() and not is_ignored(member.name):
                    name = _member(member.name)
                    file.left = math.inf
                    opened = (
                        archive.extractfile(member)
                        if member.isreg() and not member.issparse()
                        else None
                    )
                    if opened is None:
                        raise RequestInvalid(
                            f"{name} of the archive is a link or a device, not a regular file",
                            "files",
                        )
                    yield name, opened
                archive.members.clear()  # else it keeps them all
                file.left = MAX_MEMBER_HEADER_BYTES
    except _DAMAGE as exc:
        _damaged(exc)


def _unzipped(content: BinaryIO) -> Iterator[tuple[str, IO[bytes]]]:
    file = _Metered(content)
    try:
        with zipfile.ZipFile(file) as archive:
            file.left = math.inf
            for count, member in enumerate(archive.infolist()):
                _check_count(count)
                path = member.filename.replace("\\", "/")
                if path.endswith("/") or is_ignored(path):
                    continue
                name = _member(path)
                if (member.external_attr >> 16) & 0o170000 not in (0, 0o100000):
                    raise RequestInvalid(
                        f"{name} of the archive is a link or a device, not a regular file", "files"
                    )
                with archive.open(member) as opened:
                    yield name, opened
    except _DAMAGE as exc:
        _damaged(exc)


def _check_count(count: int) -> None:
    if count >= MAX_ARCHIVE_MEMBERS:
        raise RequestInvalid(f"the archive has more than {MAX_ARCHIVE_MEMBERS} members", "files")


def _member(path: str) -> str:
    parts = PurePosixPath(path.replace("\\", "/")).parts
    inside = [part for part in parts if part != "."]
    if (
        not inside
        or inside[-1] not in FILES
        or len(inside) > 2
        or ".." in inside
        or inside[0] == "/"
    ):
        raise RequestInvalid(
            f"{path[:80]!r} of the archive is not an adapter file; {', '.join(FILES)} are, at the "
            "top level or in one directory",
            "files",
        )
    return inside[-1]


def _damaged(exc: Exception) -> NoReturn:
    if isinstance(exc, (RequestInvalid, RequestTooLarge, StoreUnusable)):
        raise exc
    reason = " ".join(str(exc).split())[:200]
    raise RequestInvalid(f"the archive cannot be read ({reason})", "files") from exc
