"""The tables. Times are milliseconds since 1970 in UTC; ids are random and never used again.

`usage` and `audit` are append-only: the database itself refuses to change or delete their rows (see
the migrations), and they name what they are about by value, so they outlive it.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

__all__ = [
    "DAY_MS",
    "Adapter",
    "Admission",
    "Alias",
    "AuditEntry",
    "Base",
    "Checkpoint",
    "Delivery",
    "Event",
    "File",
    "Job",
    "Key",
    "Permission",
    "Share",
    "Tenant",
    "Usage",
    "Version",
    "Webhook",
    "new_id",
    "now_ms",
]

# SQLite counts up by itself only in an INTEGER column.
_Counter = BigInteger().with_variant(Integer, "sqlite")


DAY_MS = 86_400_000


def now_ms() -> int:
    """The time, in the database's unit."""
    return time.time_ns() // 1_000_000


def new_id(prefix: str, between: str = "_") -> str:
    """A random id, for instance `key_5f0c...`; OpenAI's own kinds have a hyphen between."""
    return f"{prefix}{between}{secrets.token_hex(12)}"


class Base(DeclarativeBase):
    """Base of all tables, with constraint names that Alembic recognises on every database."""

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
    """A tenant: the owner of keys, adapters and usage. `limits` overrides the gateway's
    defaults.
    """

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    # Secret: it keeps this tenant's prefix-cache blocks from being found, or timed, by others.
    cache_salt: Mapped[str] = mapped_column(String(64))
    limits: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)
    disabled_ms: Mapped[int | None] = mapped_column(BigInteger)


class Key(Base):
    """A secret's SHA-256 and what its bearer may do. The secret itself is shown once and kept
    nowhere.
    """

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
    """A named set of versions. `next_number` is the number of the next one; numbers are not used
    again either.
    """

    __tablename__ = "adapters"
    __table_args__ = (UniqueConstraint("tenant_id", "name"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(64))
    next_number: Mapped[int] = mapped_column(Integer, default=1)
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)

    tenant: Mapped[Tenant] = relationship(lazy="joined", innerjoin=True)


class Version(Base):
    """One immutable trained state. Its files lie in the store under `digest`; `model_id` is its
    full name, `ft:...`.
    """

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

    `production` is what the bare adapter name means. Any other alias may take `share` (0 to 1) of
    those requests.
    """

    __tablename__ = "aliases"
    __table_args__ = (CheckConstraint("share >= 0 AND share <= 1", name="share"),)

    adapter_id: Mapped[str] = mapped_column(
        ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True
    )
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    version_id: Mapped[str] = mapped_column(ForeignKey("versions.id", ondelete="CASCADE"))
    # What it named before, for rolling back.
    previous_id: Mapped[str | None] = mapped_column(ForeignKey("versions.id", ondelete="SET NULL"))
    share: Mapped[float] = mapped_column(default=0.0)
    changed_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms, onupdate=now_ms)

    version: Mapped[Version] = relationship(
        lazy="joined", innerjoin=True, foreign_keys=[version_id]
    )


class Share(Base):
    """A share: another tenant may use an adapter until the row is deleted."""

    __tablename__ = "shares"

    adapter_id: Mapped[str] = mapped_column(
        ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True
    )
    tenant_id: Mapped[str] = mapped_column(
        ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True, index=True
    )
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)


class Admission(Base):
    """A request that an engine may be working on. It becomes a usage row when it ends, whichever
    process notices.
    """

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
    """One request's tokens. `status`: completed, failed, cancelled, or interrupted (its gateway
    died: tokens unknown, 0).
    """

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
    """An entry of the audit log. `details` never holds a secret."""

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


class File(Base):
    """A file of a tenant. Its bytes are the blob `files/ID`; a row is made before its blob and
    deleted after it, so no blob is without a row. `tenant_id` is not a foreign key, so that files
    of a deleted tenant are still cleaned up.

    `status`: uploading, processed, or deleted (its blob is to be removed). `filename` is for people
    only.
    """

    __tablename__ = "files"
    __table_args__ = (Index(None, "tenant_id", "created_ms"), Index(None, "status", "created_ms"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(64))
    key_id: Mapped[str | None] = mapped_column(String(64))
    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(16))
    bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    sha256: Mapped[str | None] = mapped_column(String(64))
    # Of a data file: chat, completion, preference ..., and how many rows it has.
    format: Mapped[str | None] = mapped_column(String(16))
    rows: Mapped[int | None] = mapped_column(Integer)
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)
    expires_ms: Mapped[int | None] = mapped_column(BigInteger)


class Job(Base):
    """A fine-tuning job.

    `status`: queued, running, paused, succeeded, failed or cancelled; the last three are final.
    `wanted`: none, or the pause or cancel that was asked of a running one, or yield: it gives way
    to another tenant's. While it runs, `worker` holds its lease until `lease_until_ms`; in the
    queue that is when it gave way, None if it did not. Files and the version are named by value: a
    job outlives them.
    """

    __tablename__ = "jobs"
    __table_args__ = (Index(None, "tenant_id", "created_ms"), Index(None, "status", "created_ms"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    key_id: Mapped[str | None] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16), default="queued")
    wanted: Mapped[str] = mapped_column(String(8), default="none")
    # What was asked: the base model's public name, the method as OpenAI spells it, hyper-parameters
    # with their "auto".
    model: Mapped[str] = mapped_column(String(128))
    # The version to continue from: its full name and its files' digest. None for a new adapter.
    parent_model: Mapped[str | None] = mapped_column(String(255))
    parent_digest: Mapped[str | None] = mapped_column(String(64))
    method: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    hyperparameters: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    training_file_id: Mapped[str] = mapped_column(String(64))
    validation_file_id: Mapped[str | None] = mapped_column(String(64))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int] = mapped_column(BigInteger)
    metadata_: Mapped[dict[str, str]] = mapped_column("metadata", JSON, default=dict)
    integrations: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    priority: Mapped[int] = mapped_column(Integer, default=0)
    # What became of it: what "auto" came to, the memory that it takes, how far it is.
    resolved: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    worker: Mapped[str | None] = mapped_column(String(160))
    lease_until_ms: Mapped[int | None] = mapped_column(BigInteger)
    step: Mapped[int] = mapped_column(Integer, default=0)
    steps: Mapped[int | None] = mapped_column(Integer)
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    estimated_finish_ms: Mapped[int | None] = mapped_column(BigInteger)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    traceback: Mapped[str | None] = mapped_column(Text)
    adapter: Mapped[str] = mapped_column(String(64))
    version_id: Mapped[str | None] = mapped_column(String(64))
    fine_tuned_model: Mapped[str | None] = mapped_column(String(255))
    result_file_id: Mapped[str | None] = mapped_column(String(64))
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)
    started_ms: Mapped[int | None] = mapped_column(BigInteger)
    finished_ms: Mapped[int | None] = mapped_column(BigInteger)

    tenant: Mapped[Tenant] = relationship(lazy="joined", innerjoin=True)


class Event(Base):
    """Something that a job's owner should know. `type`: message or metrics. Those of one job are
    written one after another, each with its job's row locked, so `number` is their order.
    """

    __tablename__ = "job_events"
    __table_args__ = (Index(None, "job_id", "number"),)

    number: Mapped[int] = mapped_column(_Counter, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)


class Checkpoint(Base):
    """A state of a job on its way. It can be called once the job has succeeded: then it has a
    version, and ends with it.
    """

    __tablename__ = "job_checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    step: Mapped[int] = mapped_column(Integer)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    version_id: Mapped[str | None] = mapped_column(ForeignKey("versions.id", ondelete="CASCADE"))
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)

    version: Mapped[Version | None] = relationship(lazy="joined")


class Permission(Base):
    """A permission: another tenant may use one version, by its full name, until the row is
    deleted.
    """

    __tablename__ = "permissions"
    __table_args__ = (UniqueConstraint("version_id", "tenant_id"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    version_id: Mapped[str] = mapped_column(ForeignKey("versions.id", ondelete="CASCADE"))
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), index=True)
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)


class Webhook(Base):
    """A webhook endpoint. Signing needs the secret itself, so it is stored in plain text."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), index=True)
    name: Mapped[str] = mapped_column(String(128))
    url: Mapped[str] = mapped_column(String(2048))
    event_types: Mapped[list[str]] = mapped_column(JSON)
    secret: Mapped[str] = mapped_column(String(64))
    # After a rotation the one before may sign as well, for a while.
    old_secret: Mapped[str | None] = mapped_column(String(64))
    old_until_ms: Mapped[int | None] = mapped_column(BigInteger)
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)
    updated_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)

    def __repr__(self) -> str:
        return f"Webhook({self.id})"


class Delivery(Base):
    """One event on its way to one webhook. `status`: pending, delivered or failed. `next_ms`: when
    it is to be tried next.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (Index(None, "status", "next_ms"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    webhook_id: Mapped[str] = mapped_column(
        ForeignKey("webhooks.id", ondelete="CASCADE"), index=True
    )
    event_type: Mapped[str] = mapped_column(String(64))
    body: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(16), default="pending")
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    next_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)
    outcome: Mapped[str | None] = mapped_column(String(255))
    created_ms: Mapped[int] = mapped_column(BigInteger, default=now_ms)
    finished_ms: Mapped[int | None] = mapped_column(BigInteger)

    webhook: Mapped[Webhook] = relationship(lazy="joined", innerjoin=True)
