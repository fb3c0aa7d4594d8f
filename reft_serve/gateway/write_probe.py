"""Periodic check that the database and the stores are writable, independent of requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from reft_serve.errors import ReftError

__all__ = ["PATIENCE_SECONDS", "PROBE_SECONDS", "WriteProbe"]

_log = logging.getLogger(__name__)
PROBE_SECONDS = 2.0
PATIENCE_SECONDS = 3.0
_Write = tuple[Callable[[], Awaitable[None]], ReftError]


class WriteProbe:
    """Writes to several places every PROBE_SECONDS, while it is started. A write that takes longer
    than PATIENCE_SECONDS counts as failed until it ends.
    """

    def __init__(self, writes: Mapping[str, _Write]) -> None:
        """Do nothing yet.

        Args:
            writes: by the name of the place, how to write to it, and the failure to report if that
                cannot be done.
        """
        self._writes = writes
        self._begun: dict[str, float] = {}
        self._failed: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._probe_forever(name)) for name in self._writes]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check(self) -> None:
        """Raise the failure of the first place that cannot be written to."""
        late = time.monotonic() - PATIENCE_SECONDS
        for name, (_, failure) in self._writes.items():
            if name in self._failed or self._begun.get(name, late) < late:
                raise failure.with_traceback(None)

    async def _probe_forever(self, name: str) -> None:
        write = self._writes[name][0]
        while True:
            self._begun[name] = time.monotonic()
            try:
                await write()
                self._failed.discard(name)
            except Exception:
                if name not in self._failed:
                    _log.warning("%s cannot be written to", name, exc_info=True)
                self._failed.add(name)
            del self._begun[name]
            await asyncio.sleep(PROBE_SECONDS)
