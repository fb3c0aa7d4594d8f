"""The tables. Times are milliseconds since 1970 in UTC; ids are random and never used again.

`usage` and `audit` are append-only: the database itself refuses to change or delete their rows (see the migrations), and
they name what they are about by value, so they outlive it.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, ForeignKey, Index, Integer, MetaData, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

__all__ = [
    "Adapter",
    "Admission",
    "Alias",
    "AuditEntry",
    "Base",
    "Key",
    "Share",
    "Tenant",
    "Usage",
    "Version",
    "new_id",
    "now_ms",
]

# SQLite counts up by itself only in an INTEGER column.
_Counter = BigInteger().with_variant(Integer, "sqlite")


def now_ms() -> int:
    """The time, in the database's unit."""
    return time.time_ns() // 1_000_000


def new_id(prefix: str) -> str:
    """A random id, for instance `key_5f0c...`."""
    return f"{prefix}_{secrets.token_hex(12)}"


class Base(DeclarativeBase):
    """What all tables share: constraint names that Alembic can find again on every database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Tenant(Base):
    """Who owns keys, adapters and usage. `limits` holds those that differ from the gateway's own."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    # Secret: it keeps this tenant's prefix-cache blocks from being found, or timed, by others.
    cache_salt: Mapped[str] = mapped_column(String(64))
    limits: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)
    disabled_ms: Mapped[int | None] = mapped_column(BigInteger)


class Key(Base):
    """A secret's SHA-256 and what its bearer may do. The secret itself is shown once and kept nowhere."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), index=True)
    name: Mapped[str] = mapped_column(String(128))
    prefix: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(16))
    scopes: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    limits: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)
    expires_ms: Mapped[int | None] = mapped_column(BigInteger)
    revoked_ms: Mapped[int | None] = mapped_column(BigInteger)

    tenant: Mapped[Tenant] = relationship(lazy="joined", innerjoin=True)


class Adapter(Base):
    """A named set of versions. `next_number` is the number of the next one; numbers are not used again either."""

    __tablename__ = "adapters"
    __table_args__ = (UniqueConstraint("tenant_id", "name"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(64))
    next_number: Mapped[int] = mapped_column(Integer, default=1)
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)

    tenant: Mapped[Tenant] = relationship(lazy="joined", innerjoin=True)


class Version(Base):
    """One immutable trained state. Its files lie in the store under `digest`; `model_id` is its full name, `ft:...`."""

    __tablename__ = "versions"
    __table_args__ = (UniqueConstraint("adapter_id", "number"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"))
    number: Mapped[int] = mapped_column(Integer)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    model_id: Mapped[str] = mapped_column(String(255), unique=True)
    base_model: Mapped[str] = mapped_column(String(1024))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    # Where it came from: "upload", or a job's id.
    source: Mapped[str] = mapped_column(String(64))
    facts: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)

    adapter: Mapped[Adapter] = relationship(lazy="joined", innerjoin=True)


class Alias(Base):
    """A name of one adapter that can be moved from version to version.

    `production` is what the bare adapter name means. Any other alias may take `share` (0 to 1) of those requests.
    """

    __tablename__ = "aliases"
    __table_args__ = (CheckConstraint("share >= 0 AND share <= 1", name="share"),)

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    version_id: Mapped[str] = mapped_column(ForeignKey("versions.id", ondelete="CASCADE"))
    # What it named before, for rolling back.
    previous_id: Mapped[str | None] = mapped_column(ForeignKey("versions.id", ondelete="SET NULL"))
    share: Mapped[float] = mapped_column(default=0.0)
    changed_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms, onupdate=now_ms)

    version: Mapped[Version] = relationship(lazy="joined", innerjoin=True, foreign_keys=[version_id])


class Share(Base):
    """That another tenant may use an adapter, until the row is deleted."""

    __tablename__ = "shares"

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True, index=True)
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)


class Admission(Base):
    """A request that an engine may be working on. It becomes a usage row when it ends, whoever finds that it has ended."""

    __tablename__ = "admissions"

    request_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    gateway: Mapped[str] = mapped_column(String(128))
    tenant_id: Mapped[str] = mapped_column(String(64))
    key_id: Mapped[str] = mapped_column(String(64))
    endpoint: Mapped[str] = mapped_column(String(32))
    model: Mapped[str] = mapped_column(String(1024))
    version_id: Mapped[str | None] = mapped_column(String(64))
    started_ms: Mapped[int] = mapped_column(BigInteger, index=True)


class Usage(Base):
    """One request's tokens. `status`: completed, failed, cancelled, or interrupted (its gateway died: tokens unknown, 0)."""

    __tablename__ = "usage"
    __table_args__ = (Index(None, "tenant_id", "started_ms"),)

    id: Mapped[int] = mapped_column(_Counter, primary_key=True, autoincrement=True)
    request_id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant_id: Mapped[str] = mapped_column(String(64))
    key_id: Mapped[str] = mapped_column(String(64))
    endpoint: Mapped[str] = mapped_column(String(32))
    model: Mapped[str] = mapped_column(String(1024))
    version_id: Mapped[str | None] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    started_ms: Mapped[int] = mapped_column(BigInteger)
    duration_ms: Mapped[int] = mapped_column(BigInteger)


class AuditEntry(Base):
    """Who changed what. `details` never holds a secret."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "tenant_id", "id"),)

    id: Mapped[int] = mapped_column(_Counter, primary_key=True, autoincrement=True)
    at_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)
    # The tenant that is concerned, and the key that acted (null: the operator's command line).
    tenant_id: Mapped[str | None] = mapped_column(String(64))
    key_id: Mapped[str | None] = mapped_column(String(64))
    request_id: Mapped[str | None] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(255))
    details: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
