"""The training worker: claims jobs while there is room for them, runs each as an attempt, sweeps
up, ends in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_serve import __version__
from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.store import AdapterStore
from reft_serve.config import TrainerSettings
from reft_serve.database.connection import Database
from reft_serve.database.jobs import queue
from reft_serve.database.jobs.fine_tuning import count_jobs
from reft_serve.database.migrations.schema import check_schema, migrate
from reft_serve.errors import BaseModelInvalid, ServiceError
from reft_serve.observability import JOB_MEMORY, JOBS_ENDED, JOBS_RUNNING, WORKER_READY
from reft_serve.storage.blobs import BlobStore
from reft_serve.training import machine
from reft_serve.training.jobs.attempt import Allocation, Attempt
from reft_serve.training.jobs.context import TRANSIENT, WorkerContext
from reft_serve.training.jobs.process import JobProcesses
from reft_serve.training.jobs.sweeping import sweep

__all__ = ["Worker", "running"]

_log = logging.getLogger(__name__)
_LONGEST_PAUSE = 60.0
_SPARE = 64 << 20
_TURN_SECONDS = 1.5
_WAITED_POLLS = 3
_RETRIED: tuple[type[Exception], ...] = (BaseModelInvalid, ServiceError, *TRANSIENT)


@dataclass(frozen=True, slots=True)
class _Device:
    """Where jobs run: "cpu" or a GPU's number, and its memory for jobs."""

    name: str
    memory: int


class Worker:
    """The attempts of one process."""

    def __init__(self, ctx: WorkerContext) -> None:
        self._ctx = ctx
        self._devices: list[_Device] = []
        self._attempts: dict[asyncio.Task[None], Attempt] = {}
        self._ending = asyncio.Event()
        self._pause = self._rested = 0.0
        self._swept: float | None = None
        self._ticked = time.monotonic()
        self.unready: str | None = "the worker has not started"
        """Reason why the worker takes no jobs now, or None."""

    @property
    def alive(self) -> bool:
        """True while the worker's loop is alive."""
        return time.monotonic() - self._ticked < _LONGEST_PAUSE

    def end(self) -> None:
        """Take no more jobs, let those in progress store a checkpoint and go back to the queue,
        then leave `run`.
        """
        self._ending.set()

    async def run(self) -> None:
        settings = self._ctx.settings
        _log.info(
            "the worker starts",
            extra={
                "data": {
                    "worker": settings.worker_name,
                    "model": str(self._ctx.base),
                    "version": __version__,
                }
            },
        )
        while not self._ending.is_set():
            self._ticked = time.monotonic()
            await self._unless_ending(self._turn())
            JOBS_RUNNING.set(len(self._attempts))
            JOB_MEMORY.set(sum(attempt.memory for attempt in self._attempts.values()))
            WORKER_READY.set(self.unready is None)
            waking = [asyncio.ensure_future(self._ending.wait()), *self._attempts]
            await asyncio.wait(
                waking, timeout=settings.poll_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            waking[0].cancel()
        await self._drain(settings.drain_seconds)

    async def _unless_ending(self, turn: Coroutine[Any, Any, None]) -> None:
        """Await a look at the queue; once the worker ends, no longer than a moment, since the
        database may be away.
        """
        looking = asyncio.create_task(turn)
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait([looking, ending], return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if not looking.done():
            await asyncio.wait([looking], timeout=_TURN_SECONDS)
            looking.cancel()
            await asyncio.wait([looking], timeout=_TURN_SECONDS)
        elif looking.exception() is not None:
            looking.result()

    async def _turn(self) -> None:
        """Poll the queue once. Failures make the next polls rarer."""
        if time.monotonic() < self._rested:
            return
        try:
            await self._check()
            await self._sweep()
            while await self._take_one():
                pass
            self.unready = None
            self._pause = 0.0
        except _RETRIED as exc:
            self._rest(" ".join(str(exc).split())[:300])

    def _rest(self, why: str) -> None:
        self._pause = min(max(self._ctx.settings.poll_seconds, 2 * self._pause), _LONGEST_PAUSE / 2)
        self._rested = time.monotonic() + self._pause
        if self.unready != why:
            _log.warning("the worker takes no jobs for now", extra={"data": {"why": why}})
        self.unready = why

    async def _check(self) -> None:
        """Ask before a job is claimed for nothing.

        Raises:
            BaseModelInvalid, StoreUnusable, OSError: a job would not get far here.
        """
        ctx = self._ctx
        await asyncio.to_thread(read_base_model, ctx.base)
        await asyncio.to_thread(_check_disk, ctx.work)
        if self.unready is not None:  # after trouble, and at first
            await ctx.blobs.check()
            await asyncio.to_thread(ctx.store.check)

    async def _sweep(self) -> None:
        now = time.monotonic()
        settings = self._ctx.settings
        if self._swept is None or now > self._swept + settings.sweep_seconds:
            await sweep(self._ctx)
            self._swept = now

    async def _take_one(self) -> bool:
        """Claim a job and begin it, if there is one and room for it."""
        ctx = self._ctx
        settings = self._ctx.settings
        async with ctx.database.reading() as session:
            counts = await count_jobs(session)
        if counts.get("running", 0) > len(self._attempts):  # another worker may have died
            async with ctx.database.writing() as session:
                await queue.sweep(session, settings.train_attempts)
        if not counts.get("queued") or self._ending.is_set():
            return False
        place = await self._room()
        if place is not None and await self._claim(place):
            return True
        await self._make_way()
        return False

    async def _claim(self, place: Allocation) -> bool:
        ctx = self._ctx
        settings = self._ctx.settings
        claimed = time.monotonic()
        async with ctx.database.writing() as session:
            claim = await queue.claim(
                session,
                settings.worker_name,
                settings.lease_seconds,
                place.free,
                settings.running_per_tenant,
                settings.train_attempts,
            )
        if claim is None:
            return False
        attempt = Attempt(ctx, claim, place, claimed)
        self._attempts[asyncio.create_task(self._attend(attempt))] = attempt
        _log.info(
            "a job was claimed",
            extra={"data": {"job": claim.id, "tenant": claim.tenant, "attempt": claim.attempts}},
        )
        return True

    async def _make_way(self) -> None:
        """Ask a job that has had its turn to give way, if another tenant's waits and finds no
        room.
        """
        settings = self._ctx.settings
        now = time.monotonic()
        turns = sorted((attempt.claimed, attempt.claim.id) for attempt in self._attempts.values())
        had = [job_id for claimed, job_id in turns if now - claimed >= settings.train_turn_seconds]
        if not had or not self._devices:
            return
        largest = max(device.memory for device in self._devices)
        waited = _WAITED_POLLS * settings.poll_seconds
        async with self._ctx.database.writing() as session:
            yielding = await queue.make_way(
                session, had, largest, settings.running_per_tenant, waited
            )
        if yielding is not None:
            _log.info("a job yields", extra={"data": {"job": yielding}})

    async def _attend(self, attempt: Attempt) -> None:
        how = "crashed"
        task = asyncio.current_task()
        try:
            how = await attempt.run()
        # the job stays ours until its lease runs out; then it continues elsewhere
        except Exception:
            _log.exception("an attempt failed", extra={"data": {"job": attempt.claim.id}})
        finally:
            if task is not None:
                del self._attempts[task]
            JOBS_ENDED.labels(how).inc()
            _log.info("a job left", extra={"data": {"job": attempt.claim.id, "how": how}})
            if attempt.troubled:
                self._rest("a job failed because of this machine")

    async def _room(self) -> Allocation | None:
        """The device with most free memory; None if no more jobs are taken."""
        settings = self._ctx.settings
        if not self._devices:
            self._devices = await self._find_devices()
        cores = machine.cores()
        on_cpu = self._devices[0].name == "cpu"
        most = settings.train_jobs or (max(1, cores // 4) if on_cpu else len(self._devices))
        if len(self._attempts) >= most:
            return None
        used = dict.fromkeys((device.name for device in self._devices), 0)
        for attempt in self._attempts.values():
            # One that has not estimated yet may take all that was free when it began.
            used[attempt.place.device] += attempt.memory or attempt.place.free
        device = max(self._devices, key=lambda each: each.memory - used[each.name])
        threads = settings.train_threads or max(1, cores // most)
        free = device.memory - used[device.name]
        return Allocation(device.name, free, device.memory, threads) if free > 0 else None

    async def _find_devices(self) -> list[_Device]:
        memory = self._ctx.settings.train_memory_bytes
        devices = await self._ctx.processes.devices() or [("cpu", machine.memory())]
        return [_Device(name, memory or size * 4 // 5) for name, size in devices]

    async def _drain(self, seconds: float) -> None:
        for attempt in self._attempts.values():
            attempt.drain()
        if self._attempts:
            _log.info(
                "waiting for jobs to store a checkpoint",
                extra={"data": {"jobs": len(self._attempts)}},
            )
            await asyncio.wait(self._attempts, timeout=seconds)
        for attempt in self._attempts.values():
            attempt.give_up()
        if self._attempts:
            await asyncio.wait(self._attempts, timeout=5.0)


@contextlib.asynccontextmanager
async def running(settings: TrainerSettings) -> AsyncIterator[Worker]:
    """A worker, ready to `run`.

    Raises:
        DatabaseUnusable, StoreUnusable, BaseModelInvalid: it cannot begin.
    """
    database = Database(settings.database)
    try:
        await (migrate if settings.migrate else check_schema)(database)
        work = settings.work.expanduser().resolve()
        ctx = WorkerContext(
            settings,
            database,
            AdapterStore(settings.store),
            BlobStore(settings.blobs_url),
            JobProcesses(),
            await asyncio.to_thread(_find_base, settings.model),
            work,
        )
        yield Worker(ctx)
    finally:
        await database.close()


def _find_base(model: str) -> Path:
    """The base model's directory: itself, or where the hub's cache has it, once it is
    downloaded.
    """
    path = Path(model).expanduser()
    if path.is_dir() or model.count("/") != 1 or model.startswith((".", "~")):
        return path.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
            )
        )
    except (HfHubHTTPError, RepositoryNotFoundError, LocalEntryNotFoundError, OSError) as exc:
        raise BaseModelInvalid(
            f"REFT_MODEL {model!r} is not a directory, and cannot be downloaded from the hub: {exc}"
        ) from exc


def _check_disk(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    facts = os.statvfs(work)
    if facts.f_bavail * facts.f_frsize < _SPARE:
        raise OSError(28, "No space left on device", str(work))
