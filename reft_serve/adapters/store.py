"""The adapter store: one directory per version, named by its digest, there whole or not at all. No
torch.

Gateways, workers and engines see it under the same path: a directory of their machine, or one that
their machines share (an engine reads a version from its path, so an object store cannot stand in
for it).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reft_serve.adapters.digest import digest_of_directory
from reft_serve.errors import StoreUnusable
from reft_serve.storage.files import NO_SPACE, ScratchPath, fsync_path, probe_writes, sweep_scratch

__all__ = ["AdapterStore"]

_DIGEST = re.compile(r"[0-9a-f]{64}")


class AdapterStore:
    """Versions at rest under one root. Its methods block: call them from a thread."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self._staging = self.root / ".staging"
        self._probes = self.root / ".probes"

    def check(self) -> None:
        """Write some bytes and remove them.

        Raises:
            StoreUnusable: it cannot be written to.
        """
        try:
            probe_writes(self._probes)
        except OSError as exc:
            raise StoreUnusable(f"the adapter store cannot be written to ({exc.strerror})") from exc

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A new directory of the store's file system to put a version's files in; removed at the
        end.

        Raises:
            StoreUnusable: the disk is full or cannot be written to, now or within the block.
        """
        try:
            aside = ScratchPath.directory(self._staging)
        except OSError as exc:
            raise StoreUnusable(f"the adapter store cannot be written to ({exc.strerror})") from exc
        try:
            yield aside.path
        except OSError as exc:
            if exc.errno in NO_SPACE:
                raise StoreUnusable(
                    f"the adapter store cannot be written to ({exc.strerror})"
                ) from exc
            raise
        finally:
            aside.remove()

    def publish(self, staged: Path) -> str:
        """Move a staged directory to where its digest says, and give the digest. One that is there
        already stays.

        Raises:
            StoreUnusable: the disk is full or cannot be written to; nothing was published.
        """
        try:
            digest = digest_of_directory(staged)
            target = self.path(digest)
            for file in (*staged.iterdir(), staged):
                fsync_path(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                try:
                    os.rename(staged, target)
                except OSError:
                    if not target.exists():  # else another gateway was faster with the same bytes
                        raise
            fsync_path(target.parent)
        except OSError as exc:
            raise StoreUnusable(f"the adapter store cannot be written to ({exc.strerror})") from exc
        return digest

    def path(self, digest: str) -> Path:
        """Where the version lies, or would lie."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError("not a digest")
        return self.root / digest[:2] / digest

    def files(self, digest: str) -> list[Path]:
        """The files of a version, by name.

        Raises:
            StoreUnusable: it is not there.
        """
        try:
            return sorted(self.path(digest).iterdir())
        except OSError as exc:
            raise StoreUnusable(f"version {digest[:12]} is missing from the adapter store") from exc

    def remove(self, digest: str) -> None:
        """Remove a version; one that is not there is no fault."""
        aside = self._staging / secrets.token_hex(12)
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.path(digest), aside)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise StoreUnusable(
                f"version {digest[:12]} cannot be removed ({exc.strerror})"
            ) from exc
        shutil.rmtree(aside, ignore_errors=True)

    def digests(self) -> list[tuple[str, int]]:
        """Every version that lies here, with the time of its last change in milliseconds since
        1970.
        """
        try:
            folders = [
                path
                for folder in self.root.iterdir()
                if len(folder.name) == 2
                for path in folder.iterdir()
            ]
            named = [path for path in folders if _DIGEST.fullmatch(path.name)]
            return [(path.name, path.stat().st_mtime_ns // 1_000_000) for path in named]
        except FileNotFoundError:  # one was removed in this moment, or there is no store yet
            return self.digests() if self.root.exists() else []
        except OSError as exc:
            raise StoreUnusable(f"the adapter store cannot be read ({exc.strerror})") from exc

    def sweep(self) -> None:
        """Remove what processes that died left half written, or half removed."""
        sweep_scratch(self._staging)
        sweep_scratch(self._probes)
