"""What each tenant has and has done, as `isolation_machine` keeps it: apart from the others' and
from the gateway.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import httpx

from tests.support.gateway.harness import Tenant


@dataclass
class Alias:
    """What an alias names, named before, and takes of the bare name's requests."""

    number: int
    previous: int | None = None
    share: float = 0.0


@dataclass
class Adapter:
    """Versions by number: (model id, digest)."""

    versions: dict[int, tuple[str, str]] = field(default_factory=dict)
    aliases: dict[str, Alias] = field(default_factory=dict)
    next: int = 1

    def bare(self) -> int | None:
        """The version that the bare name means."""
        canary, production = self.aliases.get("canary"), self.aliases.get("production")
        if canary is not None and canary.share == 1.0:
            return canary.number
        return production.number if production is not None else max(self.versions, default=None)


@dataclass
class HeldKey:
    """A key beside a tenant's first one."""

    id: str
    http: httpx.Client
    role: str
    scopes: frozenset[str]
    alive: bool = True


@dataclass
class World:
    """All that one tenant has and has done."""

    tenant: Tenant
    key_id: str
    adapters: dict[str, Adapter] = field(default_factory=dict)
    keys: list[HeldKey] = field(default_factory=list)
    requests: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    salts: set[str] = field(default_factory=set)
    disabled: bool = False
