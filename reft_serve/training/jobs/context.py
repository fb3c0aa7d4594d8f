"""Context of a worker, created once at its start, and retries of transient failures. No torch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sqlalchemy.exc import IntegrityError

from reft_serve.adapters.store import AdapterStore
from reft_serve.config import TrainerSettings
from reft_serve.database.connection import FAILURES, Database
from reft_serve.errors import BlobMissing, StoreUnusable
from reft_serve.storage.blobs import BlobStore
from reft_serve.training.jobs.process import JobProcesses

__all__ = ["TRANSIENT", "WorkerContext", "retry_until"]

T = TypeVar("T")
# What is not the job's doing, and passes.
TRANSIENT: tuple[type[Exception], ...] = (*FAILURES, StoreUnusable)


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """Settings, the two shared places, this machine's scratch and processes, and the base model's
    directory.
    """

    settings: TrainerSettings
    database: Database
    store: AdapterStore
    blobs: BlobStore
    processes: JobProcesses
    base: Path
    work: Path


async def retry_until(action: Callable[[], Awaitable[T]], until: Callable[[], float]) -> T:
    """Do something that may fail because a store or the database is away, again and again until it
    works.

    Args:
        action: what to do.
        until: the time (`time.monotonic`) after which a failure is raised; asked each time, since
            it may move.
    """
    pause = 0.05
    while True:
        try:
            return await action()
        except (IntegrityError, BlobMissing):
            raise
        except TRANSIENT:
            if time.monotonic() + pause > until():
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, 2.0)
