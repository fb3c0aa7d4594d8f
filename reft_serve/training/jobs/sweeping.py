"""What dead processes leave behind: half-written files, checkpoints of ended jobs, versions that no row names."""

from __future__ import annotations

import asyncio
import re

from reft_serve.database import adapters
from reft_serve.database.jobs import fine_tuning
from reft_serve.database.models import now_ms
from reft_serve.storage.files import sweep_asides
from reft_serve.training.jobs.context import Surroundings
from reft_serve.training.jobs.publishing import retract

__all__ = ["sweep"]

_JOB = re.compile(r"checkpoints/([^/]+)/")


async def sweep(around: Surroundings) -> None:
    """Remove what belongs to nobody. Safe beside whoever publishes or trains, here or elsewhere: half-written things are
    told by their locks, versions are looked up under the lock that a publisher takes, and a young one is left alone, since
    its publisher may be about to name it.

    Raises:
        StoreUnusable, and what a database raises: another time.
    """
    await around.blobs.sweep()
    await asyncio.to_thread(around.store.sweep)
    await asyncio.to_thread(sweep_asides, around.work)
    await _sweep_checkpoints(around)
    before = now_ms() - int(around.settings.sweep_seconds * 1000)
    lying = await asyncio.to_thread(around.store.digests)
    async with around.database.reading() as session:
        named = await adapters.all_digests(session)
    strays = [digest for digest, changed in lying if changed < before and digest not in named]
    await retract(around, strays, older_than_ms=before)


async def _sweep_checkpoints(around: Surroundings) -> None:
    found = await around.blobs.list("checkpoints")
    jobs = {match[1] for blob in found if (match := _JOB.match(blob.key))}
    async with around.database.reading() as session:
        alive = await fine_tuning.unfinished_of(session, jobs)
    for blob in found:
        match = _JOB.match(blob.key)
        if match and match[1] not in alive:
            await around.blobs.delete(blob.key)
