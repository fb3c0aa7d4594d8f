"""Clean-up after dead processes: half-written files, checkpoints of ended jobs, versions without a
row.
"""

from __future__ import annotations

import asyncio
import re

from reft_serve.database import adapters
from reft_serve.database.jobs import fine_tuning
from reft_serve.database.models import now_ms
from reft_serve.storage.files import sweep_scratch
from reft_serve.training.jobs.context import WorkerContext
from reft_serve.training.jobs.publishing import retract

__all__ = ["sweep"]

_JOB = re.compile(r"checkpoints/([^/]+)/")


async def sweep(ctx: WorkerContext) -> None:
    """Remove files without an owner. Safe next to processes that publish or train, here or
    elsewhere: half-written files are recognised by their locks, versions are looked up under the
    lock that a publisher takes, and a young one is left alone, since its publisher may be about to
    name it.

    Raises:
        StoreUnusable, and what a database raises: another time.
    """
    await ctx.blobs.sweep()
    await asyncio.to_thread(ctx.store.sweep)
    await asyncio.to_thread(sweep_scratch, ctx.work)
    await _sweep_checkpoints(ctx)
    before = now_ms() - int(ctx.settings.sweep_seconds * 1000)
    lying = await asyncio.to_thread(ctx.store.digests)
    async with ctx.database.reading() as session:
        named = await adapters.all_digests(session)
    strays = [digest for digest, changed in lying if changed < before and digest not in named]
    await retract(ctx, strays, older_than_ms=before)


async def _sweep_checkpoints(ctx: WorkerContext) -> None:
    blobs = await ctx.blobs.list("checkpoints")
    jobs = {match[1] for blob in blobs if (match := _JOB.match(blob.key))}
    async with ctx.database.reading() as session:
        alive = await fine_tuning.unfinished_of(session, jobs)
    for blob in blobs:
        match = _JOB.match(blob.key)
        if match and match[1] not in alive:
            await ctx.blobs.delete(blob.key)
