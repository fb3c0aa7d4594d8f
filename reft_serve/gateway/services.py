"""The parts of a gateway process, created once at its start; routes find them through
`services_of`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from reft_serve.adapters.store import AdapterStore
from reft_serve.config import GatewaySettings
from reft_serve.database.connection import Database
from reft_serve.gateway.accounting.ledger import Ledger
from reft_serve.gateway.accounting.quotas import Quotas
from reft_serve.gateway.engines.fleet import Fleet
from reft_serve.gateway.engines.quarantine import Quarantine
from reft_serve.gateway.events.job_events import Followers
from reft_serve.gateway.events.webhook_sender import WebhookSender
from reft_serve.gateway.http.intake import Intake
from reft_serve.gateway.lookup import LookupCache
from reft_serve.gateway.uploads.checking import CheckPlaces
from reft_serve.gateway.write_probe import WriteProbe
from reft_serve.observability import BoundedNames
from reft_serve.storage.blobs import BlobStore

__all__ = ["BACKGROUND_PER_TENANT", "Services", "services_of"]

_log = logging.getLogger(__name__)
BACKGROUND_PER_TENANT = 2


@dataclass(slots=True)
class Services:
    """The parts of a running gateway."""

    settings: GatewaySettings
    database: Database
    store: AdapterStore
    fleet: Fleet
    ledger: Ledger
    quotas: Quotas
    lookup: LookupCache
    names: BoundedNames
    blobs: BlobStore
    webhook_sender: WebhookSender
    intake: Intake
    followers: Followers
    write_probe: WriteProbe
    checking: CheckPlaces = field(default_factory=CheckPlaces)
    quarantine: Quarantine = field(default_factory=Quarantine)
    draining: bool = False
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _turns: dict[str, asyncio.Semaphore] = field(default_factory=dict)
    _waiting: Counter[str] = field(default_factory=Counter)

    def drain(self) -> None:
        """Say that this process is about to end: it is not ready, and its streams of events end."""
        self.draining = True
        self.followers.close()

    def spawn(self, work: Coroutine[Any, Any, None], tenant_id: str | None = None) -> None:
        """Do this in the background; `join` waits for it. Of one tenant's, BACKGROUND_PER_TENANT
        are done at once.
        """

        async def guarded() -> None:
            try:
                if tenant_id is None:
                    await work
                else:
                    async with self._turn(tenant_id):
                        await work
            except Exception:
                _log.exception("a background task failed")

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @asynccontextmanager
    async def _turn(self, tenant_id: str) -> AsyncIterator[None]:
        self._waiting[tenant_id] += 1
        turns = self._turns.setdefault(tenant_id, asyncio.Semaphore(BACKGROUND_PER_TENANT))
        try:
            async with turns:
                yield
        finally:
            self._waiting[tenant_id] -= 1
            if not self._waiting[tenant_id]:
                del self._waiting[tenant_id], self._turns[tenant_id]

    async def join(self, patience: float) -> None:
        """Wait for work in the background, at most `patience` seconds."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=patience)


async def services_of(request: Request) -> Services:
    """The dependency that routes take."""
    services: Services = request.app.state.services
    return services
