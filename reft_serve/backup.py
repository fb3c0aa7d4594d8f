"""Consistent backup and restore of the database, and of every adapter version and blob that its
rows name.

The store and the blobs are copied first and the database after them; then newer files are copied
too. So everything that the database names is in the folder, though gateways and workers continue. A
restore trusts nothing: a version's files must have its digest, a table's rows theirs. `backup.json`
is written last: a folder without it is not a backup.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reft_serve import __version__
from reft_serve.adapters.store import AdapterStore
from reft_serve.database.connection import Database
from reft_serve.database.files import key_of_blob
from reft_serve.database.migrations.dump import DumpedTable, dump, restore, rows
from reft_serve.errors import BlobMissing, Conflict, StoreUnusable
from reft_serve.storage.blobs import BlobStore
from reft_serve.storage.files import fsync_path

__all__ = ["Backup", "Stores", "back_up", "bring_back"]

_FORMAT = 1
_BLOBS = ("files", "checkpoints")
_TRIES = 5
_NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class Stores:
    """The database and stores to back up or restore."""

    database: Database
    store: AdapterStore
    blobs: BlobStore


@dataclass(frozen=True, slots=True)
class Backup:
    """Contents of a backup. `blobs`: key to [size, sha256]; `tables`: name to {rows, sha256}."""

    revision: str
    versions: list[str]
    blobs: dict[str, list[Any]]
    tables: dict[str, dict[str, Any]]
    reft_serve: str = __version__
    created_ms: int = 0
    format: int = _FORMAT

    @property
    def rows(self) -> int:
        return sum(int(table["rows"]) for table in self.tables.values())


async def back_up(stores: Stores, folder: Path) -> Backup:
    """Write a backup into a new folder, which only its owner can read: it holds what tenants hold
    secret.

    Raises:
        Conflict: there is something at `folder`.
        StoreUnusable: a store or the folder cannot be used, or lacks what the database names.
        DatabaseUnusable: the database cannot be reached, or must be migrated first.
    """
    try:
        (folder / "database").mkdir(mode=0o700, parents=True)
        folder.chmod(0o700)
    except FileExistsError as exc:
        raise Conflict(f"{folder} already exists: choose a new folder") from exc
    except OSError as exc:
        raise StoreUnusable(f"{folder} cannot be written to ({exc.strerror})") from exc
    target = Stores(
        stores.database, AdapterStore(folder / "adapters"), BlobStore(str(folder / "blobs"))
    )
    versions, blobs = await _copy(stores, target, {})
    for left in reversed(range(_TRIES)):
        revision, tables = await dump(stores.database, folder / "database")
        versions, blobs = await _copy(stores, target, blobs)
        missing = await asyncio.to_thread(_named, folder / "database") - versions - blobs.keys()
        # else something was deleted between the two: the next moment does not name it
        if not missing:
            break
        if not left:
            raise StoreUnusable(
                "files recorded in the database are missing from the stores: "
                f"{', '.join(sorted(missing)[:5])}"
            )
    backup = Backup(
        revision,
        sorted(versions),
        blobs,
        {name: asdict(table) for name, table in tables.items()},
        created_ms=time.time_ns() // 1_000_000,
    )
    await asyncio.to_thread(_seal, folder, backup)
    return backup


async def bring_back(stores: Stores, folder: Path) -> Backup:
    """Fill an empty database, a store and blobs from a backup. Other contents of the stores are
    kept.

    Raises:
        StoreUnusable: the folder is not a backup or a damaged one, or a store cannot be written to.
        Conflict: the database is not empty.
        DatabaseUnusable: it cannot be reached, or the backup's rows are damaged; no row was put in.
    """
    backup = await asyncio.to_thread(_opened, folder)
    source = Stores(
        stores.database, AdapterStore(folder / "adapters"), BlobStore(str(folder / "blobs"))
    )
    try:  # files before rows: a row never names what is not there
        await _fill(source, stores, backup)
    except ValueError as exc:  # a store's word for a name that is none
        raise StoreUnusable(
            f"{folder / 'backup.json'} lists an entry that is not a version or file: the backup "
            "is damaged"
        ) from exc
    tables = {name: DumpedTable(**table) for name, table in backup.tables.items()}
    await restore(stores.database, folder / "database", backup.revision, tables)
    return backup


async def _copy(
    source: Stores, target: Stores, known: dict[str, list[Any]]
) -> tuple[set[str], dict[str, list[Any]]]:
    """Copy what the target lacks; gives the versions and the blobs that it has then."""
    versions = {digest for digest, _ in await asyncio.to_thread(target.store.digests)}
    there = {digest for digest, _ in await asyncio.to_thread(source.store.digests)}
    for digest in sorted(there - versions):
        try:
            await asyncio.to_thread(_copy_version, source.store, target.store, digest)
        except (StoreUnusable, FileNotFoundError):
            if source.store.path(digest).is_dir():
                raise
            continue  # it was retired in this moment
        versions.add(digest)
    blobs = dict(known)
    for prefix in _BLOBS:
        for blob in await source.blobs.list(prefix):
            if blob.key not in blobs:
                try:
                    written = await target.blobs.write(
                        blob.key, source.blobs.read(blob.key), _NO_LIMIT
                    )
                except BlobMissing:  # deleted in this moment
                    continue
                blobs[blob.key] = [written.size, written.sha256]
    return versions, blobs


async def _fill(source: Stores, target: Stores, backup: Backup) -> None:
    for digest in backup.versions:
        await asyncio.to_thread(_copy_version, source.store, target.store, digest)
    for key, (size, sha256) in backup.blobs.items():
        written = await target.blobs.write(key, source.blobs.read(key), _NO_LIMIT)
        if (written.size, written.sha256) != (size, sha256):
            await target.blobs.delete(key)
            raise StoreUnusable(
                f"the backup's blob {key} does not match its checksum: it is damaged"
            )


def _named(folder: Path) -> set[str]:
    """Every version and blob that a dump's rows name."""
    digests = {str(row["digest"]) for row in rows(folder, "versions")}
    return digests | {
        key_of_blob(str(row["id"])) for row in rows(folder, "files") if row["status"] == "processed"
    }


def _copy_version(source: AdapterStore, target: AdapterStore, digest: str) -> None:
    with target.staging() as place:
        for file in source.files(digest):
            shutil.copyfile(file, place / file.name)
        copied = target.publish(place)
    if copied != digest:
        target.remove(copied)
        raise StoreUnusable(
            f"version {digest[:12]} is damaged in {source.root}: its files do not match its digest"
        )


def _seal(folder: Path, backup: Backup) -> None:
    for file in (folder / "database").iterdir():
        fsync_path(file)
    fsync_path(folder / "database")
    aside = folder / "backup.json.writing"
    aside.write_text(json.dumps(asdict(backup), indent=1))
    fsync_path(aside)
    aside.rename(folder / "backup.json")
    fsync_path(folder)


def _opened(folder: Path) -> Backup:
    try:
        contents = json.loads((folder / "backup.json").read_text())
        if contents.get("format") != _FORMAT:
            raise StoreUnusable(
                f"{folder} is a backup of another format ({contents.get('format')}): use a "
                "matching release"
            )
        backup = Backup(**contents)
        _check(backup)
        return backup
    except FileNotFoundError as exc:
        raise StoreUnusable(
            f"{folder} is not a backup, or an incomplete one: it has no backup.json"
        ) from exc
    except (OSError, ValueError, TypeError, AttributeError) as exc:
        raise StoreUnusable(
            f"{folder / 'backup.json'} cannot be read: the backup is damaged"
        ) from exc


def _check(backup: Backup) -> None:
    """Raise ValueError or TypeError where a fact is of another sort. Names of places are checked by
    the stores.
    """
    for table in backup.tables.values():
        DumpedTable(**table)
    if not all(
        isinstance(size, int) and isinstance(sha256, str) for size, sha256 in backup.blobs.values()
    ):
        raise TypeError("a blob's size and digest")
