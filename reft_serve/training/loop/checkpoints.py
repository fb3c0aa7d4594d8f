"""Checkpoints: each a directory that can be served, with everything that a run needs to resume from
it bit for bit.

transformers writes the state of optimiser, schedule and random generators file by file, so a
checkpoint counts only once its last file, the seal, is there. What a killed process left without
one is swept away. No torch.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from reft_serve.adapters.structure import FILES
from reft_serve.storage.files import fsync_path

__all__ = [
    "SEAL",
    "SERVED",
    "newest",
    "rotate",
    "seal",
    "sealed",
    "sweep",
    "sync",
]

_NAME = re.compile(r"checkpoint-(\d+)")
SEAL = "complete"
# The files of a checkpoint that are the adapter.
SERVED = FILES


def sealed(folder: Path) -> dict[int, Path]:
    """The whole checkpoints in a run's folder, by their step, ascending."""
    return {step: path for step, path in sorted(_all(folder).items()) if (path / SEAL).exists()}


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint; None if there is none."""
    return next(reversed(sealed(folder).values()), None)


def sweep(folder: Path) -> None:
    """Remove what is not a whole checkpoint."""
    for path in _all(folder).values():
        if not (path / SEAL).exists():
            shutil.rmtree(path)


def seal(path: Path) -> None:
    """Say that everything is written, once it is on the disk."""
    sync(path)
    with open(path / SEAL, "xb") as marker:
        os.fsync(marker.fileno())
    fsync_path(path)


def rotate(folder: Path, keep: int, best: int | None) -> None:
    """Keep the last `keep` whole checkpoints and the one of step `best`."""
    for step, path in list(sealed(folder).items())[:-keep]:
        if step != best:
            # First the seal: a half-removed checkpoint must not count.
            (path / SEAL).unlink()
            shutil.rmtree(path)


def _all(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    return {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }


def sync(folder: Path) -> None:
    """Have a directory and its files on the disk."""
    for file in folder.iterdir():
        fsync_path(file)
    fsync_path(folder)
