"""The name of a version: sha256 in hex over the names, lengths and bytes of its files, in the order
of their names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

__all__ = ["digest_of", "digest_of_directory"]

_CHUNK = 1 << 20


def digest_of(files: Mapping[str, bytes]) -> str:
    """The digest of files that are in memory, by their names."""
    return _digest((name, len(content), (content,)) for name, content in files.items())


def digest_of_directory(path: Path) -> str:
    """The digest of the files of a directory, without taking them into memory."""
    return _digest((file.name, file.stat().st_size, _chunks(file)) for file in path.iterdir())


def _digest(files: Iterable[tuple[str, int, Iterable[bytes]]]) -> str:
    digest = hashlib.sha256()
    for name, size, chunks in sorted(files, key=lambda file: file[0]):
        digest.update(f"{name}\0{size}\0".encode())
        for chunk in chunks:
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            yield chunk
