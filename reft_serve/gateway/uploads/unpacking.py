"""Unpacking of an upload into a staged directory with an adapter's files, checked, and nothing
else.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import UploadFile
from starlette.types import Receive

from reft_serve.adapters.archives import copy_file, is_archive, is_ignored
from reft_serve.adapters.header import header_bytes
from reft_serve.adapters.structure import (
    CONFIG,
    FILES,
    LORA_CONFIG,
    LORA_TENSORS,
    TENSORS,
    check_structure,
)
from reft_serve.errors import RequestInvalid, StoreUnusable
from reft_serve.gateway.uploads.checking import CheckPlaces, checking_for
from reft_serve.gateway.uploads.subprocess_check import check_in_subprocess

__all__ = ["CheckedAdapter", "Uploaded", "stage"]

# Configuration and headers of this size are checked in some milliseconds; a process needs longer to
# begin.
_SMALL = 128 << 10


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """A staged adapter: its size in bytes, and its manifest's facts."""

    size: int
    base_model: str
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The files of one upload. `name`: what messages call the adapter; `receive`: the request's, to
    see the caller leave.
    """

    name: str
    files: list[UploadFile]
    tenant_id: str
    receive: Receive


async def stage(
    uploaded: Uploaded, into: Path, max_bytes: int, places: CheckPlaces
) -> CheckedAdapter:
    """Write the files of an upload (single ones, or those of one archive) into a directory, and
    check them.

    Raises:
        AdapterInvalid: they are not a sound adapter.
        RequestInvalid: a file that does not belong to an adapter, one that appears twice, or a
            damaged archive.
        RequestTooLarge: together they have more than `max_bytes`.
        RateLimited: too many of the tenant's uploads wait to be checked.
        StoreUnusable: the directory cannot be written to.
    """
    archives = [file for file in uploaded.files if is_archive(file.filename or "")]
    if archives and len(uploaded.files) > 1:
        raise RequestInvalid("an archive must be the only file of the upload", "files")
    if archives:
        return await _unpacked(uploaded, archives[0], into, max_bytes, places)
    size = await asyncio.to_thread(_copied, uploaded.files, into, max_bytes)
    if await asyncio.to_thread(_is_small, into, uploaded.name):
        manifest = await asyncio.to_thread(check_structure, into, uploaded.name)
        return CheckedAdapter(size, manifest.base_model.name, manifest.summary())
    async with checking_for(places, uploaded.tenant_id, uploaded.receive):
        report = await check_in_subprocess(
            "adapter", {"path": str(into), "where": uploaded.name}, None, size
        )
    return CheckedAdapter(size, report["base_model"], report["facts"])


async def _unpacked(
    uploaded: Uploaded, archive: UploadFile, into: Path, max_bytes: int, places: CheckPlaces
) -> CheckedAdapter:
    arguments = {
        "name": archive.filename,
        "into": str(into),
        "max_bytes": max_bytes,
        "where": uploaded.name,
    }
    async with checking_for(places, uploaded.tenant_id, uploaded.receive):
        try:
            # which may write what was in memory
            descriptor = await asyncio.to_thread(archive.file.fileno)
        except OSError as exc:
            raise StoreUnusable(f"the upload cannot be written to disk ({exc.strerror})") from exc
        report = await check_in_subprocess("archive", arguments, descriptor, archive.size or 0)
    return CheckedAdapter(report["size"], report["base_model"], report["facts"])


def _copied(files: list[UploadFile], into: Path, max_bytes: int) -> int:
    taken = 0
    for file in files:
        name = file.filename or ""
        if is_ignored(name):
            continue
        if name not in FILES:
            raise RequestInvalid(
                f"{name[:80]!r} is not an adapter file: upload {', '.join(FILES[:2])} (and "
                f"{', '.join(FILES[2:])}), or one .tar, .tar.gz, .tar.bz2, .tar.xz or .zip that "
                "contains them",
                "files",
            )
        taken += copy_file(file.file, into, name, max_bytes - taken)
    return taken


def _is_small(path: Path, where: str) -> bool:
    configs = [path / name for name in (CONFIG, LORA_CONFIG) if (path / name).exists()]
    tensors = [path / name for name in (TENSORS, LORA_TENSORS) if (path / name).exists()]
    return all(file.stat().st_size <= _SMALL for file in configs) and all(
        min(header_bytes(file, where), file.stat().st_size) <= _SMALL for file in tensors
    )
