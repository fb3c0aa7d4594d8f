"""Request and response schemas of the webhook routes, as the `openai` package's types have them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

from reft_serve.database import models
from reft_serve.database.webhooks import EventType
from reft_serve.gateway.schemas.fields import NO_NUL
from reft_serve.gateway.schemas.fine_tuning import Identified
from reft_serve.gateway.schemas.request_model import RequestModel

__all__ = [
    "EventTypesOut",
    "RotationIn",
    "WebhookIn",
    "WebhookOut",
    "WebhookPatch",
    "WebhookSecretOut",
    "WebhookTestIn",
    "WebhookTestOut",
]

_Name = Annotated[str, Field(min_length=1, max_length=128, pattern=NO_NUL)]
_Url = Annotated[str, Field(max_length=2048, pattern=r"^https?://[!-~]+$")]
_EventTypes = Annotated[
    list[EventType],
    Field(min_length=1, max_length=8),
    AfterValidator(lambda types: list(dict.fromkeys(types))),
]


class WebhookIn(RequestModel):
    """A webhook endpoint to make."""

    name: _Name
    url: _Url
    event_types: _EventTypes


class WebhookPatch(RequestModel):
    """Changes of a webhook."""

    name: _Name | None = None
    url: _Url | None = None
    event_types: _EventTypes | None = None


class RotationIn(RequestModel):
    """Keep the previous secret valid for a while."""

    keep_old_secret_active_for_24_hours: bool = False


class WebhookTestIn(RequestModel):
    """Which sample to send."""

    event_type: EventType


class WebhookOut(Identified):
    """A webhook endpoint, without its secret."""

    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    name: str
    url: str
    event_types: list[str]
    created_at: int
    updated_at: int
    signing_secret_hint: str

    @classmethod
    def fields_of(cls, row: models.Webhook) -> dict[str, Any]:
        """Its values, from its row."""
        return {
            "id": row.id,
            "name": row.name,
            "url": row.url,
            "event_types": row.event_types,
            "created_at": row.created_ms // 1000,
            "updated_at": row.updated_ms // 1000,
            "signing_secret_hint": f"whsec_...{row.secret[-5:-1]}",
        }


class WebhookSecretOut(WebhookOut):
    """A webhook endpoint with its secret, which is shown only now."""

    signing_secret: str


class EventTypesOut(BaseModel):
    """Event types that a webhook can subscribe to."""

    object: Literal["list"] = "list"
    data: list[str]


class WebhookTestOut(BaseModel):
    """The answer to a sample event. `success`: whether its status is 2xx."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: bool
