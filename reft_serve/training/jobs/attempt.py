"""One job as a worker has it, from its claim to its end, or back to the queue.

`prepare -> follow -> settle`, while the lease is kept and checkpoints are uploaded to the file
store. Nothing is lost on the way: what is not this job's doing (a store or database that is away, a
full disk, a base model that is gone) gives the job back, to resume from its last stored checkpoint;
what is its owner's ends it with a sentence; an unknown failure counts as a failed attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from reft_serve.database.jobs import claimed
from reft_serve.database.jobs.outcomes import Cancelled, Failed, Outcome, Wanted
from reft_serve.database.jobs.queue import Claim
from reft_serve.errors import BaseModelInvalid, LeaseLost, StoreUnusable
from reft_serve.recipes.hyperparameters import read_hyperparameters
from reft_serve.storage.files import ScratchPath
from reft_serve.training.jobs import inputs, memory
from reft_serve.training.jobs.bounds import hours_sentence
from reft_serve.training.jobs.context import TRANSIENT, WorkerContext
from reft_serve.training.jobs.lease import Lease
from reft_serve.training.jobs.messages import (
    Bounds,
    Broken,
    Ended,
    JobSpec,
    Measured,
    Message,
    Noted,
    Resolved,
    Saved,
    Started,
)
from reft_serve.training.jobs.process import JobProcess
from reft_serve.training.jobs.progress import RunProgress
from reft_serve.training.jobs.publishing import publish
from reft_serve.training.jobs.uploads import Uploads

__all__ = ["Allocation", "Attempt"]

_log = logging.getLogger(__name__)
_GRACE_SECONDS = 300.0
AttemptResult = Literal["succeeded", "failed", "cancelled", "paused", "queued", "lost"]


@dataclass(frozen=True, slots=True)
class Allocation:
    """The device of a job ("cpu" or a GPU's number), its free and whole memory in bytes, and the
    job's threads on the CPU.
    """

    device: str
    free: int
    total: int
    threads: int


class _Trouble(Exception):
    """Something of this machine or its surroundings; the message is for the job's owner."""


_RETRIED: tuple[type[Exception], ...] = (_Trouble, *TRANSIENT)
_RELEASES: tuple[type[Exception], ...] = (LeaseLost, *TRANSIENT)


class Attempt:
    """One claimed job on its way."""

    def __init__(self, ctx: WorkerContext, claim: Claim, place: Allocation, claimed: float) -> None:
        self._ctx = ctx
        self.claim = claim
        self.place = place
        self.claimed = claimed
        self._lease = Lease(ctx.database, claim, ctx.settings.lease_seconds, claimed)
        self._child: JobProcess | None = None
        self._last: Ended | Broken | None = None
        self._progress = RunProgress(self._lease)
        self._lost = self._draining = self._giving_up = self._too_long = False
        self.memory = 0
        self.troubled = False
        """True if the job returned to the queue because of this machine."""

    async def run(self) -> AttemptResult:
        """Do what can be done; the answer is what became of the job."""
        keeping = asyncio.create_task(self._keep())
        try:
            return await self._run()
        except _RELEASES as exc:
            _log.warning(
                "a lost job's process was stopped",
                extra={"data": {"job": self.claim.id, "why": str(exc)[:300]}},
            )
            self.troubled = not isinstance(exc, LeaseLost)
            return "lost"
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    def drain(self) -> None:
        """Ask the job to store a checkpoint after its step and return to the queue."""
        self._draining = True
        if self._child is not None:
            self._child.stop()

    def give_up(self) -> None:
        """Return the job to the queue now, from its last stored checkpoint."""
        self._draining = self._giving_up = True
        if self._child is not None:
            self._child.kill()

    async def _keep(self) -> None:
        try:
            await self._lease.keep(self._heard)
        except LeaseLost:
            self._lost = True
        except Exception:
            _log.exception("a lease cannot be renewed", extra={"data": {"job": self.claim.id}})
            self._lost = True
        if self._child is not None:
            self._child.kill()

    def _heard(self, wanted: Wanted) -> None:
        if self._child is not None:
            if wanted == "cancel":
                self._child.kill()
            elif wanted in ("pause", "yield"):
                self._child.stop()

    async def _run(self) -> AttemptResult:
        try:
            aside = await asyncio.to_thread(ScratchPath.directory, self._ctx.work)
        except OSError as exc:
            return await self._back(f"the worker's disk cannot be used ({exc.strerror})")
        uploads = Uploads(self._ctx, self.claim, self._lease)
        try:
            if not await self._fits():
                return await self._release(memory_bytes=self.memory)
            spec = await self._prepare(aside.path)
            if spec is None:
                return await self._release()
            code = await self._follow(spec, uploads)
            return await self._settle(aside.path / "run", code, uploads)
        except inputs.Unfit as exc:
            return await self._finish(exc.failure)
        except _RETRIED as exc:
            return await self._back(_why(exc))
        finally:
            await uploads.close()
            if self._child is not None:
                self._child.kill()
                await asyncio.shield(self._child.wait())
            await asyncio.shield(asyncio.to_thread(aside.remove))

    async def _fits(self) -> bool:
        """True if the job's memory is available; else it waits for memory or for another worker."""
        ctx = self._ctx
        asked = read_hyperparameters(self.claim.hyperparameters)
        try:
            self.memory = await asyncio.to_thread(
                memory.estimate, ctx.base, asked, gpu=self.place.device != "cpu"
            )
        except (OSError, ValueError, BaseModelInvalid) as exc:
            raise _Trouble("the base model cannot be read on the worker") from exc
        if self.memory > self.place.total:
            needs, has = (f"{size / 2**30:.1f} GiB" for size in (self.memory, self.place.total))
            sentence = (
                f"The job needs about {needs} of memory and worker {ctx.settings.worker_name} has "
                f"{has}; "
            )
            self._lease.queue_event(sentence + "it waits for a larger one", "warn")
        return self.memory <= self.place.free

    async def _prepare(self, folder: Path) -> JobSpec | None:
        """The job process's input; None if the job is no longer wanted."""
        claim = self.claim
        ctx = self._ctx
        inputs.check_name(claim)
        files = [
            ("training_file", claim.training_file_id),
            ("validation_file", claim.validation_file_id),
        ]
        paths = [
            await inputs.fetch_file(ctx, file_id, param, folder)
            for param, file_id in files
            if file_id
        ]
        parent = await inputs.fetch_parent(ctx, claim, folder)
        await inputs.fetch_checkpoint(ctx, claim, folder)
        if self._draining or self._lease.wanted != "none":
            return None
        return JobSpec(
            job=claim.id,
            folder=str(folder),
            base=str(ctx.base),
            training=str(paths[0]),
            validation=str(paths[1]) if paths[1:] else None,
            method=claim.method.get("type", "supervised"),
            hyperparameters=dict(claim.hyperparameters),
            resolved=dict(claim.resolved),
            seed=claim.seed,
            started=datetime.fromtimestamp(claim.started_ms / 1000, UTC).replace(tzinfo=None),
            bounds=self._bounds(),
            device=self.place.device,
            threads=self.place.threads,
            reports=inputs.report_variables(claim),
            parent=None if parent is None else str(parent),
            parent_name=claim.parent_model,
        )

    def _bounds(self) -> Bounds:
        limits = self._ctx.settings.limits.merged(self.claim.limits)
        return Bounds(
            examples=limits.job_examples, tokens=limits.job_tokens, hours=limits.job_hours
        )

    def _end_too_long(self) -> None:
        """End an attempt that has taken all the time of its job, in case its process does not end
        itself.
        """
        self._too_long = True
        if self._child is not None:
            self._child.kill()

    async def _follow(self, spec: JobSpec, uploads: Uploads) -> int | None:
        """Run its process, and hear it to its end."""
        child = self._child = await self._ctx.processes.start(spec)
        # it was said while the process was made
        if self._draining or self._lease.wanted in ("pause", "yield"):
            child.stop()
        if self._lost or self._giving_up or self._lease.wanted == "cancel":
            child.kill()
        watch = None
        if spec.bounds.hours is not None:
            after = spec.bounds.hours * 3600 + _GRACE_SECONDS
            watch = asyncio.get_running_loop().call_later(after, self._end_too_long)
        try:
            async for message in child.messages():
                await self._take(message, uploads)
            return await child.wait()
        finally:
            if watch is not None:
                watch.cancel()

    async def _take(self, message: Message, uploads: Uploads) -> None:
        claim = self.claim
        worker = self.claim.worker
        if isinstance(message, Noted):
            self._lease.queue_event(message.message, "warn")
        elif isinstance(message, Resolved):
            # Memory only once: where it was too little, more was put down since.
            resolved = message.resolved
            needed = None if claim.resolved else self.memory
            await self._lease.write(
                lambda session: claimed.resolve(
                    session, claim.id, worker, resolved, memory_bytes=needed
                )
            )
        elif isinstance(message, Started):
            self._progress.begin(message)
        elif isinstance(message, Measured):
            self._progress.measure(message, uploads)
        elif isinstance(message, Saved):
            uploads.add(message)
        else:
            self._last = message

    async def _settle(self, run: Path, code: int | None, uploads: Uploads) -> AttemptResult:
        last = self._last
        if self._lost:
            raise LeaseLost(f"job {self.claim.id} was lost")
        stopped = self._stopped()
        if stopped is not None:
            return await self._finish(stopped)
        if isinstance(last, Ended) and last.done:
            return await self._succeed(run, last)
        if isinstance(last, Ended):
            await uploads.finish()
            return await self._release()
        if isinstance(last, Broken):
            return await self._failed(last)
        if self._giving_up:
            return await self._release()
        reason = (
            f"the job's process ended with code {code} (below 0: by that signal; -9 may be a lack "
            "of memory)"
        )
        return await self._release(
            reason, memory_bytes=self._more_memory() if code == -signal.SIGKILL else None
        )

    def _stopped(self) -> Outcome | None:
        """Outcome of a job that was stopped for good."""
        if self._lease.wanted == "cancel":
            return Cancelled()
        if self._too_long and not (isinstance(self._last, Ended) and self._last.done):
            return Failed("job_limit", hours_sentence(self._bounds().hours or 0))
        return None

    async def _succeed(self, run: Path, last: Ended) -> AttemptResult:
        """Publish, as soon as the stores and the database let us."""
        deadline = time.monotonic() + self._ctx.settings.patience_seconds
        await self._send_events()
        while True:
            try:
                status = await publish(self._ctx, self.claim, run, last.tokens)
                break
            except TRANSIENT:
                if time.monotonic() > min(deadline, self._lease.until()):
                    raise
                _log.warning("a version cannot be published yet; retrying", exc_info=True)
                await asyncio.sleep(0.5)
        await self._forget_checkpoints()
        return status if status != "running" else "lost"

    async def _failed(self, broken: Broken) -> AttemptResult:
        _log.warning(
            "a run broke",
            extra={"data": {"job": self.claim.id, "whose": broken.cause, "why": broken.message}},
        )
        if broken.cause == "user":
            return await self._finish(
                Failed(broken.code, broken.message, broken.param, broken.traceback)
            )
        if broken.cause == "machine":
            return await self._back(broken.message)
        return await self._release(
            broken.traceback or broken.message,
            memory_bytes=self._more_memory() if broken.cause == "memory" else None,
        )

    def _more_memory(self) -> int:
        """Raise the estimate after an out-of-memory kill, capped so that the job can still be
        scheduled.
        """
        return min(int(1.5 * self.memory), self.place.total)

    async def _finish(self, outcome: Outcome) -> AttemptResult:
        claim = self.claim
        await self._send_events()
        status = await self._lease.write(
            lambda session: claimed.finish(session, claim.id, claim.worker, outcome)
        )
        await self._forget_checkpoints()
        return status if status != "running" else "lost"

    async def _back(self, why: str) -> AttemptResult:
        """Give the job back for a reason that is not its own."""
        self.troubled = True
        sentence = (
            f"The job returned to the queue and will continue from its last checkpoint: {why}"
        )
        self._lease.queue_event(sentence, "warn")
        return await self._release()

    async def _release(
        self, traceback: str | None = None, memory_bytes: int | None = None
    ) -> AttemptResult:
        claim = self.claim
        await self._send_events()
        status = await self._lease.write(
            lambda session: claimed.release(
                session,
                claim.id,
                claim.worker,
                traceback,
                memory_bytes,
                self._ctx.settings.train_attempts,
            )
        )
        if status in ("failed", "cancelled"):
            await self._forget_checkpoints()
        return status if status != "running" else "lost"

    async def _send_events(self) -> None:
        """Send the queued events before the lease ends."""
        with contextlib.suppress(*TRANSIENT):
            await self._lease.heartbeat()

    async def _forget_checkpoints(self) -> None:
        """An ended job needs none; what cannot be removed now is swept up later."""
        with contextlib.suppress(*TRANSIENT):
            for blob in await inputs.checkpoints_of(self._ctx, self.claim.id):
                await self._ctx.blobs.delete(blob.key)


def _why(exc: Exception) -> str:
    """A failure of the surroundings in words for a job's owner: no statement, no path."""
    if isinstance(exc, (StoreUnusable, _Trouble)):
        return str(exc)
    if isinstance(exc, OSError) and exc.strerror and exc.filename:
        return f"the worker's disk cannot be used ({exc.strerror})"
    return "the database did not respond"
