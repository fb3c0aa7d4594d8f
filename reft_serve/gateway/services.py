"""The parts of a gateway process, created once at its start; routes find them through
`services_of`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi import Request

from reft_serve.adapters.store import AdapterStore
from reft_serve.config import GatewaySettings
from reft_serve.database.connection import Database
from reft_serve.gateway.accounting.ledger import Ledger
from reft_serve.gateway.accounting.quotas import Quotas
from reft_serve.gateway.background import Background
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

__all__ = ["Services", "services_of"]


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
    background: Background = field(default_factory=Background)
    draining: bool = False

    def drain(self) -> None:
        """Report from now on that this process is not ready, and end its streams of events."""
        self.draining = True
        self.followers.close()


async def services_of(request: Request) -> Services:
    """The dependency that routes take."""
    services: Services = request.app.state.services
    return services
