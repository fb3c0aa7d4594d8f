"""Request and response schemas of the gateway's own routes. Times are seconds since 1970, as
everywhere in OpenAI's API.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field, WithJsonSchema

from reft_serve.config import TenantLimits
from reft_serve.database import models
from reft_serve.database.keys import ROLES, Role, Scope, own_limits
from reft_serve.database.names import ADAPTER_NAME, ALIAS_NAME
from reft_serve.database.tenants import TENANT_NAME
from reft_serve.errors import EngineTrouble
from reft_serve.gateway.schemas.fields import NO_NUL, JsonInteger
from reft_serve.gateway.schemas.request_model import NULLS_ARE_ABSENT, RequestModel

__all__ = [
    "AdapterOut",
    "AliasIn",
    "AliasOut",
    "AuditOut",
    "Deleted",
    "EngineOut",
    "KeyIn",
    "KeyOut",
    "ListOf",
    "ModelOut",
    "NewKeyOut",
    "TenantIn",
    "TenantOut",
    "TenantPatch",
    "UsageOut",
    "VersionOut",
]

T = TypeVar("T")
AdapterName = Annotated[str, Field(pattern=ADAPTER_NAME)]
AliasName = Annotated[str, Field(pattern=ALIAS_NAME)]
Selector = Annotated[
    str,
    Field(
        pattern=r"^([0-9]{1,9}|[a-z][a-z0-9-]{0,30})$",
        description="A version's number or an alias.",
    ),
]
_Limits = Annotated[TenantLimits, *NULLS_ARE_ABSENT]
_Seconds = Annotated[int, Field(ge=0, le=10**11), JsonInteger]


class ListOf(BaseModel, Generic[T]):
    """A list, or a page of one: if `has_more`, ask for the next with `after`, the last id of this
    page.
    """

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = False


class Deleted(BaseModel):
    """Confirmation of a deletion."""

    id: str
    object: str
    deleted: Literal[True] = True


class ModelOut(BaseModel):
    """OpenAI's model object."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class VersionOut(BaseModel):
    """One version of an adapter."""

    object: Literal["adapter.version"] = "adapter.version"
    id: str
    adapter: str
    version: int
    model: str
    digest: str
    bytes: int
    base_model: str
    source: str
    facts: dict[str, Any]
    created_at: int

    @classmethod
    def of(cls, row: models.Version) -> VersionOut:
        return cls(
            id=row.id,
            adapter=row.adapter.name,
            version=row.number,
            model=row.model_id,
            digest=row.digest,
            bytes=row.size_bytes,
            base_model=row.base_model,
            source=row.source,
            facts=row.facts,
            created_at=row.created_ms // 1000,
        )


class AliasOut(BaseModel):
    """An alias and the version that it names."""

    object: Literal["adapter.alias"] = "adapter.alias"
    alias: str
    version: int
    share: float
    changed_at: int

    @classmethod
    def of(cls, row: models.Alias) -> AliasOut:
        return cls(
            alias=row.name,
            version=row.version.number,
            share=row.share,
            changed_at=row.changed_ms // 1000,
        )


class AliasIn(RequestModel):
    """Target of an alias, and the share of the bare name's requests that it takes."""

    version: Selector
    share: Annotated[float, Field(ge=0, le=1)] | None = None


class AdapterOut(BaseModel):
    """An adapter with its latest versions, the latest first; the others are listed by its
    `/versions`.
    """

    object: Literal["adapter"] = "adapter"
    id: str
    name: str
    versions: list[VersionOut]
    aliases: list[AliasOut]
    shared_with: list[str]
    created_at: int


class TenantIn(RequestModel):
    """A tenant to make."""

    name: Annotated[str, Field(pattern=TENANT_NAME)]
    limits: _Limits = TenantLimits()


class TenantPatch(RequestModel):
    """Changes of a tenant. A field that is left out keeps its value."""

    limits: _Limits | None = None
    disabled: bool | None = None


class TenantOut(BaseModel):
    """A tenant. `id` is what others need to share an adapter with it."""

    object: Literal["tenant"] = "tenant"
    id: str
    name: str
    limits: TenantLimits
    disabled: bool
    created_at: int

    @classmethod
    def of(cls, row: models.Tenant) -> TenantOut:
        return cls(
            id=row.id,
            name=row.name,
            limits=TenantLimits.model_validate(row.limits),
            disabled=row.disabled_ms is not None,
            created_at=row.created_ms // 1000,
        )


class KeyLimits(TenantLimits):
    """The limits of one key; a limit that counts what belongs to no key must be null."""

    running_jobs: Annotated[int | None, WithJsonSchema({"type": "null"})] = Field(
        default=None, description="Not supported for keys: a limit of tenants only."
    )


class KeyIn(RequestModel):
    """A key to make."""

    name: Annotated[str, Field(max_length=128, pattern=NO_NUL)] = ""
    role: Role = "inference"
    scopes: list[Scope] | None = None
    expires_at: _Seconds | None = None
    limits: Annotated[KeyLimits, *NULLS_ARE_ABSENT] = KeyLimits()


class KeyOut(BaseModel):
    """A key, without its secret."""

    object: Literal["key"] = "key"
    id: str
    name: str
    prefix: str
    role: Role
    scopes: list[str]
    limits: TenantLimits
    created_at: int
    expires_at: int | None
    revoked: bool

    @classmethod
    def fields_of(cls, row: models.Key) -> dict[str, Any]:
        """Its values, from its row."""
        return {
            "id": row.id,
            "name": row.name,
            "prefix": row.prefix,
            "role": row.role,
            "scopes": row.scopes if row.scopes is not None else sorted(ROLES[row.role]),  # type: ignore[index]
            "limits": TenantLimits.model_validate(own_limits(row)),
            "created_at": row.created_ms // 1000,
            "expires_at": None if row.expires_ms is None else row.expires_ms // 1000,
            "revoked": row.revoked_ms is not None,
        }


class NewKeyOut(KeyOut):
    """A key with its secret, which is shown only now."""

    secret: str


class UsageOut(BaseModel):
    """Sums over one bucket and one group."""

    object: Literal["usage"] = "usage"
    start_time: int | None
    group: dict[str, str | None]
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class AuditOut(BaseModel):
    """One change."""

    object: Literal["audit.entry"] = "audit.entry"
    id: int
    at: int
    tenant_id: str | None
    key_id: str | None
    request_id: str | None
    action: str
    subject: str
    details: dict[str, Any]

    @classmethod
    def of(cls, row: models.AuditEntry) -> AuditOut:
        return cls(
            id=row.id,
            at=row.at_ms // 1000,
            tenant_id=row.tenant_id,
            key_id=row.key_id,
            request_id=row.request_id,
            action=row.action,
            subject=row.subject,
            details=row.details,
        )


class EngineOut(BaseModel):
    """One engine as this gateway sees it. `reason` and `message`: why it cannot be used; null if it
    can.
    """

    object: Literal["engine"] = "engine"
    name: str
    healthy: bool
    reason: EngineTrouble | None
    message: str | None
    draining: bool
    in_flight: int
