"""Which files other users of the machine may use."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path


def readable_by_others(folder: Path) -> list[str]:
    """Files and folders in `folder` that its group or others have any permission for, with their
    modes.
    """
    return [f"{path.name} {mode:o}" for path, mode in _modes(folder) if mode & 0o077]


def _modes(folder: Path) -> Iterator[tuple[Path, int]]:
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            yield path, stat.S_IMODE(path.lstat().st_mode)
