"""OpenAI's webhook endpoints, which report to a tenant that its jobs have ended."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request

from reft_serve.database import audit, webhooks
from reft_serve.database.keys import Principal
from reft_serve.errors import RequestInvalid
from reft_serve.gateway.events import webhook_sender
from reft_serve.gateway.routes.bounded_route import BoundedRoute
from reft_serve.gateway.routes.deps import ServicesDep, actor_of, requires
from reft_serve.gateway.schemas.fine_tuning import Page
from reft_serve.gateway.schemas.tenancy import Deleted
from reft_serve.gateway.schemas.webhooks import (
    EventTypesOut,
    RotationIn,
    WebhookIn,
    WebhookOut,
    WebhookPatch,
    WebhookSecretOut,
    WebhookTestIn,
    WebhookTestOut,
)

__all__ = ["TESTS_PER_MINUTE", "router"]

router = APIRouter(prefix="/v1", tags=["webhooks"], route_class=BoundedRoute)
TESTS_PER_MINUTE = 20
_ID = r"^we_[0-9a-f]{24}$"
_Caller = Annotated[Principal, Depends(requires("webhooks"))]
_Webhook = Annotated[str, Path(pattern=_ID)]


@router.get("/webhook_event_types")
async def event_types(_: _Caller) -> EventTypesOut:
    """List the event types that a webhook can subscribe to."""
    return EventTypesOut(data=list(webhooks.EVENT_TYPES))


@router.post("/webhook_endpoints")
async def create(
    body: WebhookIn, request: Request, caller: _Caller, services: ServicesDep
) -> WebhookSecretOut:
    """Create a webhook endpoint. Only this response contains the signing secret."""
    webhook_sender.check_url(body.url, services.settings)
    async with services.database.writing() as session:
        created = await webhooks.add_webhook(
            session, caller.tenant_id, body.name, body.url, body.event_types
        )
        audit.record(
            session,
            actor_of(request),
            "webhook.create",
            created.id,
            caller.tenant_id,
            name=created.name,
        )
    return WebhookSecretOut(signing_secret=created.secret, **WebhookOut.fields_of(created))


@router.get("/webhook_endpoints")
async def list_all(
    caller: _Caller,
    services: ServicesDep,
    after: Annotated[str | None, Query(pattern=_ID)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[WebhookOut]:
    """List the tenant's webhook endpoints, newest first, without their secrets."""
    async with services.database.reading() as session:
        rows, more = await webhooks.list_webhooks(
            session, caller.tenant_id, after=after, limit=limit
        )
    return Page.of([WebhookOut(**WebhookOut.fields_of(webhook)) for webhook in rows], more)


@router.get("/webhook_endpoints/{webhook}")
async def get(webhook: _Webhook, caller: _Caller, services: ServicesDep) -> WebhookOut:
    """Get one webhook endpoint."""
    async with services.database.reading() as session:
        return WebhookOut(
            **WebhookOut.fields_of(await webhooks.find_webhook(session, caller.tenant_id, webhook))
        )


@router.post("/webhook_endpoints/{webhook}")
async def change(
    webhook: _Webhook, body: WebhookPatch, request: Request, caller: _Caller, services: ServicesDep
) -> WebhookOut:
    """Change the fields in the body; other fields keep their values."""
    if body.url is not None:
        webhook_sender.check_url(body.url, services.settings)
    async with services.database.writing() as session:
        row = await webhooks.find_webhook(session, caller.tenant_id, webhook)
        changes = body.model_dump(exclude_none=True)
        webhooks.change_webhook(row, changes)
        audit.record(
            session,
            actor_of(request),
            "webhook.change",
            webhook,
            caller.tenant_id,
            changed=sorted(changes),
        )
        return WebhookOut(**WebhookOut.fields_of(row))


@router.delete("/webhook_endpoints/{webhook}")
async def delete(
    webhook: _Webhook, request: Request, caller: _Caller, services: ServicesDep
) -> Deleted:
    """Delete a webhook endpoint and its pending deliveries."""
    async with services.database.writing() as session:
        await webhooks.delete_webhook(session, caller.tenant_id, webhook)
        audit.record(session, actor_of(request), "webhook.delete", webhook, caller.tenant_id)
    return Deleted(id=webhook, object="webhook_endpoint.deleted")


@router.post("/webhook_endpoints/{webhook}/rotate_secret")
async def rotate(
    webhook: _Webhook,
    request: Request,
    caller: _Caller,
    services: ServicesDep,
    body: RotationIn | None = None,
) -> WebhookSecretOut:
    """Replace the signing secret. With `keep_old_secret_active_for_24_hours`, both secrets sign for
    a day.
    """
    keep = body is not None and body.keep_old_secret_active_for_24_hours
    async with services.database.writing() as session:
        row = await webhooks.find_webhook(session, caller.tenant_id, webhook)
        webhooks.rotate_secret(row, keep)
        audit.record(
            session, actor_of(request), "webhook.rotate", webhook, caller.tenant_id, keep_old=keep
        )
        return WebhookSecretOut(signing_secret=row.secret, **WebhookOut.fields_of(row))


@router.post("/webhook_endpoints/{webhook}/test")
async def test(
    webhook: _Webhook, body: WebhookTestIn, caller: _Caller, services: ServicesDep
) -> WebhookTestOut:
    """Send a sample event now and report the response. `success` is true for a 2xx status."""
    await services.quotas.take(caller, "webhook tests", TESTS_PER_MINUTE)
    async with services.database.reading() as session:
        row = await webhooks.find_webhook(session, caller.tenant_id, webhook)
    sample = webhooks.body_of(body.event_type, {"id": "ftjob-0123456789abcdef01234567"})
    status, outcome = await services.webhook_sender.test(webhooks.outbound_event(row, sample))
    if status is None:
        raise RequestInvalid(f"the endpoint could not be reached: {outcome}")
    return WebhookTestOut(
        webhook_endpoint_id=webhook,
        event_type=body.event_type,
        status_code=status,
        success=200 <= status < 300,
    )
