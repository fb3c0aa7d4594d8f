"""Work that a request leaves behind: done in the background, and awaited at shutdown."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

__all__ = ["TASKS_PER_TENANT", "Background"]

_log = logging.getLogger(__name__)
TASKS_PER_TENANT = 2


class Background:
    """Tasks of this process; those of one tenant run TASKS_PER_TENANT at once."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._waiting: Counter[str] = Counter()

    def spawn(self, work: Coroutine[Any, Any, None], tenant_id: str | None = None) -> None:
        """Run `work` in the background, in its tenant's turn; log what it raises."""
        task = asyncio.create_task(self._guarded(work, tenant_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def join(self, patience: float) -> None:
        """Wait for all tasks, at most `patience` seconds."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=patience)

    async def _guarded(self, work: Coroutine[Any, Any, None], tenant_id: str | None) -> None:
        try:
            if tenant_id is None:
                await work
            else:
                async with self._turn(tenant_id):
                    await work
        except Exception:
            _log.exception("a background task failed")

    @asynccontextmanager
    async def _turn(self, tenant_id: str) -> AsyncIterator[None]:
        self._waiting[tenant_id] += 1
        turns = self._turns.setdefault(tenant_id, asyncio.Semaphore(TASKS_PER_TENANT))
        try:
            async with turns:
                yield
        finally:
            self._waiting[tenant_id] -= 1
            if not self._waiting[tenant_id]:
                del self._waiting[tenant_id], self._turns[tenant_id]
