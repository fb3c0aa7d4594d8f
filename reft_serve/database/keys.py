"""API keys: made, recognised, revoked, rotated. Only a SHA-256 is kept; a key of 256 random bits needs no slower hash."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.models import Key, Tenant, new_id, now_ms
from reft_serve.errors import NotAllowed, NotFound

__all__ = [
    "ROLES",
    "Principal",
    "Role",
    "Scope",
    "authenticate",
    "create_key",
    "digest_of_secret",
    "find_key",
    "list_keys",
    "revoke_key",
    "rotate_key",
    "scopes_of",
]

Role = Literal["admin", "owner", "inference", "metrics"]
Scope = Literal["inference", "models", "adapters", "files", "jobs", "usage", "keys", "webhooks", "metrics", "admin"]
_INFERENCE: frozenset[Scope] = frozenset({"inference", "models"})
_OWNER: frozenset[Scope] = _INFERENCE | {"adapters", "files", "jobs", "usage", "keys", "webhooks"}
_METRICS: frozenset[Scope] = frozenset({"metrics"})
ROLES: Mapping[Role, frozenset[Scope]] = {
    "admin": _OWNER | _METRICS | {"admin"}, "owner": _OWNER, "inference": _INFERENCE, "metrics": _METRICS,
}  # fmt: skip
_START, _SHOWN = "rk-", 9


@dataclass(frozen=True, slots=True)
class Principal:
    """Whose request it is and what it may do. `limits` are the tenant's own, `key_limits` the key's."""

    tenant_id: str
    tenant: str
    key_id: str
    role: Role
    scopes: frozenset[str]
    cache_salt: str
    limits: Mapping[str, Any]
    key_limits: Mapping[str, Any]
    expires_ms: int | None

    def __repr__(self) -> str:
        return f"Principal({self.tenant}, {self.key_id}, {self.role})"


def scopes_of(role: Role, chosen: Iterable[str] | None) -> frozenset[str]:
    """What a key may do: all that its role may, or what was chosen of it."""
    return frozenset(ROLES[role]) if chosen is None else ROLES[role] & frozenset(chosen)


def digest_of_secret(secret: str) -> str:
    """What the database knows a key by."""
    return hashlib.sha256(secret.encode()).hexdigest()


async def create_key(
    session: AsyncSession,
    tenant: Tenant,
    role: Role,
    name: str = "",
    scopes: Iterable[str] | None = None,
    expires_ms: int | None = None,
    limits: dict[str, Any] | None = None,
) -> tuple[Key, str]:
    """Make a key: (its row, its secret, which nobody can see again).

    Raises:
        NotAllowed: a scope that the role does not have.
    """
    chosen = None if scopes is None else sorted(set(scopes))
    beyond = set(chosen or ()) - ROLES[role]
    if beyond:
        raise NotAllowed(f"a key of role {role} cannot have the scopes {', '.join(sorted(beyond))}")
    secret = _START + secrets.token_urlsafe(32)
    key = Key(
        id=new_id("key"), tenant=tenant, name=name, prefix=secret[:_SHOWN], digest=digest_of_secret(secret),
        role=role, scopes=chosen, expires_ms=expires_ms, limits=limits or {},
    )  # fmt: skip
    session.add(key)
    await session.flush()
    return key, secret


async def authenticate(session: AsyncSession, digest: str) -> Principal | None:
    """Who holds the key with this digest; None where it is unknown, expired, revoked, or its tenant is disabled."""
    key = await session.scalar(select(Key).where(Key.digest == digest))
    if key is None or key.revoked_ms is not None or key.tenant.disabled_ms is not None:
        return None
    if key.expires_ms is not None and key.expires_ms <= now_ms():
        return None
    role: Role = key.role  # type: ignore[assignment]
    return Principal(
        key.tenant_id, key.tenant.name, key.id, role, scopes_of(role, key.scopes), key.tenant.cache_salt,
        key.tenant.limits, key.limits, key.expires_ms,
    )  # fmt: skip


async def list_keys(session: AsyncSession, tenant_id: str) -> Sequence[Key]:
    """A tenant's keys, revoked ones too, the oldest first."""
    return (await session.scalars(select(Key).where(Key.tenant_id == tenant_id).order_by(Key.created_ms, Key.id))).all()


async def find_key(session: AsyncSession, tenant_id: str, key_id: str) -> Key:
    """One key of a tenant.

    Raises:
        NotFound: it has none of this id.
    """
    key = await session.scalar(select(Key).where(Key.tenant_id == tenant_id, Key.id == key_id))
    if key is None:
        raise NotFound(f"there is no key {key_id[:80]!r}")
    return key


async def rotate_key(session: AsyncSession, old: Key, overlap_seconds: int = 0) -> tuple[Key, str]:
    """Make a key like an old one, which goes on for `overlap_seconds`: (the new one's row, its secret).

    Raises:
        NotAllowed: the old one is revoked or has expired.
    """
    if old.revoked_ms is not None or (old.expires_ms is not None and old.expires_ms <= now_ms()):
        raise NotAllowed("a key that is revoked or has expired is not rotated; make a new one")
    role: Role = old.role  # type: ignore[assignment]
    made = await create_key(session, old.tenant, role, old.name, old.scopes, old.expires_ms, old.limits)
    revoke_key(old, now_ms() + overlap_seconds * 1000 if overlap_seconds else None)
    return made


def revoke_key(key: Key, at_ms: int | None = None) -> None:
    """End a key's life, now or at a moment to come (for rotation: the old key lives on for a while)."""
    if at_ms is None:
        key.revoked_ms = key.revoked_ms or now_ms()
    else:
        key.expires_ms = at_ms if key.expires_ms is None else min(at_ms, key.expires_ms)
