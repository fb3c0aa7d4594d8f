"""Checkpoints on their way to the file store, next to the run: the newest counts, and the run never
waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

from reft_serve.database.jobs import claimed
from reft_serve.database.jobs.queue import Claim
from reft_serve.errors import LeaseLost
from reft_serve.training.jobs.context import TRANSIENT, WorkerContext, retry_until
from reft_serve.training.jobs.inputs import checkpoint_key, checkpoints_of
from reft_serve.training.jobs.lease import Lease
from reft_serve.training.jobs.messages import Saved

__all__ = ["Uploads"]


class Uploads:
    """The checkpoints of one attempt."""

    def __init__(self, ctx: WorkerContext, claim: Claim, lease: Lease) -> None:
        self._ctx = ctx
        self._claim = claim
        self._lease = lease
        self._metrics: dict[int, dict[str, float]] = {}
        self._waiting: tuple[Saved, dict[str, float]] | None = None
        self._moving: asyncio.Task[None] | None = None

    def note(self, step: int, metrics: dict[str, float]) -> None:
        """Keep the numbers of a step for its checkpoint."""
        self._metrics = {step: self._metrics.get(step, {}) | metrics}

    def add(self, saved: Saved) -> None:
        """Store a checkpoint, unless a newer one comes before its turn does."""
        if self._waiting is not None:
            Path(self._waiting[0].path).unlink(missing_ok=True)
        self._waiting = (saved, self._metrics.get(saved.step, {}))
        if self._moving is None or self._moving.done():
            self._moving = asyncio.create_task(self._move())

    async def finish(self) -> None:
        """Wait until the newest checkpoint is stored, or seems not to come there."""
        if self._moving is not None:
            await self._moving

    async def close(self) -> None:
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.gather(self._moving, return_exceptions=True)

    async def _move(self) -> None:
        while self._waiting is not None:
            (saved, metrics) = self._waiting
            self._waiting = None
            # then another has the job, and the lease's keeper says so
            with contextlib.suppress(LeaseLost):
                await self._store(saved, metrics)

    async def _store(self, saved: Saved, metrics: dict[str, float]) -> None:
        claim = self._claim
        step = saved.step
        blobs = self._ctx.blobs
        path = Path(saved.path)
        deadline = time.monotonic() + self._ctx.settings.patience_seconds
        try:
            await retry_until(
                lambda: blobs.put(path, checkpoint_key(claim.id, step)), lambda: deadline
            )
            limits = self._ctx.settings.limits
            await self._lease.write(
                lambda session: claimed.add_checkpoint(
                    session, claim.id, claim.worker, step, metrics, limits
                )
            )
            for blob in await checkpoints_of(self._ctx, claim.id):
                if blob.key < checkpoint_key(claim.id, step):
                    await blobs.delete(blob.key)
        except TRANSIENT as exc:
            self._lease.queue_event(
                f"The checkpoint of step {step} could not be stored: {exc}", "warn"
            )
        finally:
            path.unlink(missing_ok=True)
