"""API keys: made, recognised, revoked, rotated. Only a SHA-256 is kept; a key of 256 random bits
needs no slower hash.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, delete, func, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.models import Key, Tenant, new_id, now_ms
from reft_serve.errors import NotAllowed, NotFound, RateLimited, RequestInvalid

__all__ = [
    "ENDED_KEYS",
    "MAKERS",
    "ROLES",
    "Principal",
    "Role",
    "Scope",
    "authenticate",
    "check_count",
    "check_rotation",
    "create_key",
    "digest_of_secret",
    "end_within",
    "find_key",
    "limits_within",
    "list_keys",
    "living_keys",
    "own_limits",
    "revoke_key",
    "rotate_key",
    "scopes_of",
]

Role = Literal["admin", "owner", "inference", "metrics"]
Scope = Literal[
    "inference",
    "models",
    "adapters",
    "files",
    "jobs",
    "usage",
    "keys",
    "webhooks",
    "metrics",
    "admin",
]
_INFERENCE: frozenset[Scope] = frozenset({"inference", "models"})
_OWNER: frozenset[Scope] = _INFERENCE | {"adapters", "files", "jobs", "usage", "keys", "webhooks"}
_METRICS: frozenset[Scope] = frozenset({"metrics"})
ROLES: Mapping[Role, frozenset[Scope]] = {
    "admin": _OWNER | _METRICS | {"admin"},
    "owner": _OWNER,
    "inference": _INFERENCE,
    "metrics": _METRICS,
}
# Revoked and expired keys of a tenant that are kept to be listed.
ENDED_KEYS = 1000
_START = "rk-"
_SHOWN = 9
# Of a key's column of limits: the name that they are counted under, and the limits of its makers.
_COUNTED_AS = "counted_as"
_WITHIN = "within"
MAKERS = 8


@dataclass(frozen=True, slots=True)
class Principal:
    """Whose request it is and what it may do. `limits` are the tenant's own, `key_limits` the
    key's. `counters` are the limits that bind the key in addition to its tenant's, each with the
    name that it is counted under: those of the keys that made it, and its own.
    """

    tenant_id: str
    tenant: str
    key_id: str
    role: Role
    scopes: frozenset[str]
    cache_salt: str
    limits: Mapping[str, Any]
    key_limits: Mapping[str, Any]
    expires_ms: int | None
    counters: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def __repr__(self) -> str:
        return f"Principal({self.tenant}, {self.key_id}, {self.role})"


def scopes_of(role: Role, chosen: Iterable[str] | None) -> frozenset[str]:
    """Scopes of a key: all of its role's, or the selected ones."""
    return frozenset(ROLES[role]) if chosen is None else ROLES[role] & frozenset(chosen)


def own_limits(key: Key) -> dict[str, Any]:
    """The limits that a key was given."""
    return {name: value for name, value in key.limits.items() if name not in (_COUNTED_AS, _WITHIN)}


def limits_within(maker: Principal, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The limits of a key that `maker` creates: the requested ones, else the maker's. The new key's
    usage is counted with its maker's.

    Raises:
        NotAllowed: a limit beyond the maker's, or too long a line of makers.
    """
    if not maker.key_limits:
        return dict(wanted)
    for name, most in maker.key_limits.items():
        if wanted.get(name, most) > most:
            raise NotAllowed(
                f"this API key's own limit of {name} is {most}: it cannot create a key with a "
                "larger one"
            )
    within = [[counter, dict(limits)] for counter, limits in maker.counters]
    if len(within) > MAKERS:
        raise NotAllowed(
            f"a key with limits makes keys, and those make keys, {MAKERS} times at most"
        )
    return {**maker.key_limits, **wanted, _WITHIN: within}


def end_within(maker: Principal, given_ms: int | None) -> int | None:
    """Expiry of a key that `maker` creates: the requested one, else the maker's.

    Raises:
        NotAllowed: later than its maker.
    """
    if maker.expires_ms is not None and given_ms is not None and given_ms > maker.expires_ms:
        raise NotAllowed("this API key cannot create a key that expires later than itself")
    return maker.expires_ms if given_ms is None else given_ms


def check_rotation(caller: Principal, old: Key) -> None:
    """Check that a rotation gives the caller no further rights.

    Raises:
        NotAllowed: the key ends later than the caller's, or is not bound by its limits.
    """
    end_within(caller, old.expires_ms if old.expires_ms is not None else (1 << 62))
    if not {counter for counter, _ in caller.counters} <= {
        counter for counter, _ in _counters_of(old)
    }:
        raise NotAllowed(
            "this API key has its own limits: it can only rotate itself and the keys that it "
            "created"
        )


def _counters_of(key: Key) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    own = own_limits(key)
    within = tuple((counter, limits) for counter, limits in key.limits.get(_WITHIN, ()))
    return (*within, (key.limits.get(_COUNTED_AS, key.id), own)) if own else within


def digest_of_secret(secret: str) -> str:
    """Digest under which the database stores a key."""
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
    """Create a key. Returns (its row, its secret, which is not stored).

    Raises:
        NotAllowed: a scope that the role does not have.
        RequestInvalid: a limit that keys do not have.
    """
    if (limits or {}).get("running_jobs") is not None:
        raise RequestInvalid(
            "running_jobs is a limit of tenants: jobs do not belong to keys", "limits.running_jobs"
        )
    chosen = None if scopes is None else sorted(set(scopes))
    beyond = set(chosen or ()) - ROLES[role]
    if beyond:
        raise NotAllowed(f"a key of role {role} cannot have the scopes {', '.join(sorted(beyond))}")
    secret = _START + secrets.token_urlsafe(32)
    key = Key(
        id=new_id("key"),
        tenant=tenant,
        name=name,
        prefix=secret[:_SHOWN],
        digest=digest_of_secret(secret),
        role=role,
        scopes=chosen,
        expires_ms=expires_ms,
        limits=limits or {},
    )
    session.add(key)
    await session.flush()
    return key, secret


async def authenticate(session: AsyncSession, digest: str) -> Principal | None:
    """Principal of the key with this digest; None if it is unknown, expired or revoked, or its
    tenant is disabled.
    """
    key = await session.scalar(select(Key).where(Key.digest == digest))
    if key is None or key.revoked_ms is not None or key.tenant.disabled_ms is not None:
        return None
    if key.expires_ms is not None and key.expires_ms <= now_ms():
        return None
    role: Role = key.role  # type: ignore[assignment]
    return Principal(
        key.tenant_id,
        key.tenant.name,
        key.id,
        role,
        scopes_of(role, key.scopes),
        key.tenant.cache_salt,
        key.tenant.limits,
        own_limits(key),
        key.expires_ms,
        _counters_of(key),
    )


async def living_keys(session: AsyncSession, key_ids: Collection[str]) -> set[str]:
    """Those of these keys that are neither revoked nor expired, and whose tenants are not
    disabled.
    """
    able = select(Tenant.id).where(Tenant.disabled_ms.is_(None))
    query = select(Key.id).where(Key.id.in_(key_ids), ~_ended(now_ms()), Key.tenant_id.in_(able))
    return set((await session.scalars(query)).all())


async def list_keys(
    session: AsyncSession, tenant_id: str, *, after: str | None = None, limit: int | None = None
) -> Sequence[Key]:
    """A tenant's keys, revoked ones too, the oldest first; `after` is the id that the page before
    ended with.

    Raises:
        NotFound: it has no key `after`.
    """
    query = (
        select(Key).where(Key.tenant_id == tenant_id).order_by(Key.created_ms, Key.id).limit(limit)
    )
    if after is not None:
        last = await find_key(session, tenant_id, after)
        query = query.where(tuple_(Key.created_ms, Key.id) > tuple_(last.created_ms, last.id))
    return (await session.scalars(query)).all()


async def check_count(session: AsyncSession, tenant: Tenant, most: int | None) -> None:
    """Check that a tenant may have one more valid key. Of its revoked or expired keys, the oldest
    beyond ENDED_KEYS are removed.

    Args:
        session: a writing one.
        tenant: whose; its row is locked until the transaction ends.
        most: how many it may have; None: any number.

    Raises:
        RateLimited: it has that many.
    """
    await session.execute(select(Tenant.id).where(Tenant.id == tenant.id).with_for_update())
    mine = select(Key.id).where(Key.tenant_id == tenant.id)
    moment = now_ms()
    alive = await session.scalar(
        select(func.count()).select_from(mine.where(~_ended(moment)).subquery())
    )
    if most is not None and (alive or 0) >= most:
        raise RateLimited(f"the limit of {most} keys is used up; revoke one first", 60.0)
    old = (
        mine.where(_ended(moment)).order_by(Key.created_ms.desc(), Key.id.desc()).offset(ENDED_KEYS)
    )
    await session.execute(
        delete(Key).where(Key.id.in_((await session.scalars(old.limit(1000))).all()))
    )


def _ended(moment: int) -> ColumnElement[bool]:
    return or_(
        Key.revoked_ms.is_not(None), (Key.expires_ms.is_not(None)) & (Key.expires_ms <= moment)
    )


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
    """Make a key like an old one, which continues for `overlap_seconds`: (the new one's row, its
    secret).

    Raises:
        NotAllowed: the old one is revoked or has expired.
    """
    if old.revoked_ms is not None or (old.expires_ms is not None and old.expires_ms <= now_ms()):
        raise NotAllowed("a revoked or expired key cannot be rotated; create a new one")
    role: Role = old.role  # type: ignore[assignment]
    # A new key would begin a new minute.
    limits = {**old.limits, _COUNTED_AS: old.limits.get(_COUNTED_AS, old.id)} if old.limits else {}
    replacement = await create_key(
        session, old.tenant, role, old.name, old.scopes, old.expires_ms, limits
    )
    revoke_key(old, now_ms() + overlap_seconds * 1000 if overlap_seconds else None)
    return replacement


def revoke_key(key: Key, at_ms: int | None = None) -> None:
    """End a key's life, now or at a moment to come (for rotation: the old key lives on for a
    while).
    """
    if at_ms is None:
        key.revoked_ms = key.revoked_ms or now_ms()
    else:
        key.expires_ms = at_ms if key.expires_ms is None else min(at_ms, key.expires_ms)
