"""Queue of usage records: many are committed together, and none is dropped while the process
lives.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field

from sqlalchemy import Connection

from reft_serve.database.connection import Database
from reft_serve.database.usage import Ending, Opening, admit, settle
from reft_serve.observability import LEDGER_PENDING

__all__ = ["Ledger"]

_log = logging.getLogger(__name__)
_RETRY_SECONDS = 0.2
_BATCH = 500
_SOON_SECONDS = 0.2
# If a record has waited for longer, the database counts as unable to write.
_LATE_SECONDS = 5.0


@dataclass(eq=False, slots=True)
class _Record:
    what: Opening | Ending
    since: float = field(default_factory=time.monotonic)
    committed: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Ledger:
    """A queue before the database's usage tables. While one batch commits, the next one gathers.

    Nothing of an answer may be seen whose request is not on disk: a stream is admitted before its
    first event. A whole answer is given when it is settled, which is enough; only one that takes
    long is admitted too, so that it is known of if the process dies.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._records: list[_Record] = []
        self._filled = asyncio.Event()
        self._noted: dict[str, asyncio.TimerHandle] = {}
        self._admitted: set[str] = set()
        self._writing: asyncio.Task[None] | None = None
        self._failing = False

    @property
    def healthy(self) -> bool:
        """True if the recent records were written."""
        late = bool(self._records) and time.monotonic() - self._records[0].since > _LATE_SECONDS
        return not self._failing and not late

    def start(self) -> None:
        self._writing = asyncio.create_task(self._write_forever())

    async def close(self, patience: float = 10.0) -> None:
        """Write what is left and stop."""
        if self._writing is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while self._records:
                    await asyncio.sleep(0.01)
        self._writing.cancel()
        with suppress(asyncio.CancelledError):
            await self._writing

    def admit(self, opening: Opening) -> asyncio.Future[None]:
        """Record that a request begins; the future is done when it is on disk."""
        return self._put(opening).committed

    def note(self, opening: Opening) -> None:
        """Record that a request begins, unless it ends in a moment."""
        later = asyncio.get_running_loop().call_later(_SOON_SECONDS, self._put, opening)
        self._noted[opening.request_id] = later

    def settle(self, ending: Ending) -> asyncio.Future[None]:
        """Record the usage of a request; the future is done when it is on disk."""
        noted = self._noted.pop(ending.opening.request_id, None)
        if noted is not None:
            noted.cancel()
        return self._put(ending).committed

    def retract(self, ending: Ending) -> None:
        """Record something else of a request whose ending waits to be written: its answer was not
        given.
        """
        for record in self._records:
            if (
                isinstance(record.what, Ending)
                and record.what.opening.request_id == ending.opening.request_id
            ):
                record.what = ending

    def _put(self, what: Opening | Ending) -> _Record:
        record = _Record(what)
        self._records.append(record)
        LEDGER_PENDING.set(len(self._records))
        self._filled.set()
        return record

    async def _write_forever(self) -> None:
        while True:
            await self._filled.wait()
            batch = self._records[:_BATCH]
            try:
                await self._write(batch)
            except Exception:
                self._failing = True
                _log.exception("usage records cannot be written; retrying")
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self._failing = False
            del self._records[: len(batch)]
            LEDGER_PENDING.set(len(self._records))
            for record in batch:
                if not record.committed.done():
                    record.committed.set_result(None)
            if not self._records:
                self._filled.clear()

    async def _write(self, batch: list[_Record]) -> None:
        endings = [record.what for record in batch if isinstance(record.what, Ending)]
        ended = {ending.opening.request_id for ending in endings}
        openings = [
            r.what for r in batch if isinstance(r.what, Opening) and r.what.request_id not in ended
        ]
        # Before it is tried: a commit whose answer is lost may have happened.
        self._admitted.update(opening.request_id for opening in openings)
        admitted = ended & self._admitted

        def work(connection: Connection) -> None:
            admit(connection, openings)
            # As they are now: they may have been retracted while the database was waited for.
            settle(
                connection,
                [record.what for record in batch if isinstance(record.what, Ending)],
                admitted,
            )

        await self._database.commit(work)
        self._admitted -= admitted
