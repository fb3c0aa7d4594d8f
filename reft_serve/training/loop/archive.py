"""A run in progress as one file, from which another machine continues bit for bit."""

from __future__ import annotations

import tarfile
from pathlib import Path

from reft_serve.errors import StoreUnusable
from reft_serve.training.loop import checkpoints

__all__ = ["pack", "unpack"]

_RECORD = ("run.json", "metrics.jsonl")


def pack(run: Path, file: Path) -> None:
    """Write the run's record and its whole checkpoints: the newest with all it needs to continue,
    the others as versions.
    """
    newest = checkpoints.newest(run / "checkpoints")
    with tarfile.open(file, "w") as archive:
        for name in _RECORD:
            archive.add(run / name, name)
        for path in checkpoints.sealed(run / "checkpoints").values():
            served = {*checkpoints.SERVED, checkpoints.SEAL}
            # The seal last, as it was written.
            for part in sorted(
                path.iterdir(), key=lambda part: (part.name == checkpoints.SEAL, part.name)
            ):
                if path == newest or part.name in served:
                    archive.add(part, f"checkpoints/{path.name}/{part.name}")


def unpack(file: Path, run: Path) -> None:
    """Restore a packed run.

    Raises:
        StoreUnusable: the file is damaged; `run` is then to be thrown away.
    """
    try:
        with tarfile.open(file, "r:") as archive:
            archive.extractall(run, filter="data")
    except (tarfile.TarError, EOFError, ValueError) as exc:
        raise StoreUnusable(f"a stored checkpoint is damaged ({str(exc)[:200]})") from exc
