"""The log files of `reft-serve up`: one per process, bounded, read as they grow."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path

__all__ = ["NAMES", "LogFiles", "Tail"]

NAMES = ("engine", "gateway", "worker")
_MOST_BYTES = 16 << 20


class LogFiles:
    """DIR/logs, with NAME.log for each process. What the previous run wrote is NAME.log.1."""

    def __init__(self, data: Path) -> None:
        self.folder = data / "logs"

    def path(self, name: str) -> Path:
        """Where the log of a process is."""
        return self.folder / f"{name}.log"

    def begin(self) -> None:
        """Put the previous run's logs aside, and make empty ones.

        Raises:
            OSError: the folder cannot be written to.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in NAMES:
            path = self.path(name)
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, _aside(path))
            path.touch(mode=0o600)

    def bound(self) -> None:
        """Put a log aside that has grown beyond 16 MiB. Its process appends, so it continues at the
        start of the file.
        """
        for name in NAMES:
            path = self.path(name)
            with contextlib.suppress(OSError):
                if path.stat().st_size > _MOST_BYTES:
                    shutil.copyfile(path, _aside(path))
                    os.truncate(path, 0)

    def last_lines(self, name: str, count: int) -> list[str]:
        """The last lines of a log; none if there is no log."""
        try:
            with self.path(name).open(errors="replace") as file:
                return [line.rstrip("\n") for line in deque(file, count)]
        except OSError:
            return []


class Tail:
    """The lines that are added to a file, also after it was truncated or replaced. A file that is
    missing has none.
    """

    def __init__(self, path: Path, last: int | None = None) -> None:
        self._path = path
        self._offset = 0
        self._inode = 0
        self._rest = b""
        if last is not None:
            self._skip_to(last)

    def read(self) -> Iterator[str]:
        """The whole lines since the last call."""
        try:
            with self._path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_ino != self._inode or facts.st_size < self._offset:
                    self._inode, self._offset, self._rest = facts.st_ino, 0, b""
                file.seek(self._offset)
                added = file.read()
        except OSError:
            return
        self._offset += len(added)
        *lines, self._rest = (self._rest + added).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)

    def _skip_to(self, last: int) -> None:
        """Begin with the last so many lines."""
        with contextlib.suppress(OSError):
            content = self._path.read_bytes()
            kept = content.splitlines(keepends=True)[-last:] if last else []
            self._inode = self._path.stat().st_ino
            self._offset = len(content) - sum(len(line) for line in kept)


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")
