"""Webhook endpoints, and the deliveries of events to them.

A delivery is enqueued in the transaction of the change that it reports. If the process that claims
it dies, another retries. So an event is delivered at least once, always with the same id.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, delete, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.models import DAY_MS, Delivery, Webhook, new_id, now_ms
from reft_serve.errors import NotFound, RequestInvalid

__all__ = [
    "EVENT_TYPES",
    "PENDING_PER_WEBHOOK",
    "WEBHOOKS_PER_TENANT",
    "DueWebhook",
    "EventType",
    "OutboundEvent",
    "add_webhook",
    "change_webhook",
    "claim_deliveries",
    "delete_webhook",
    "due_webhooks",
    "enqueue",
    "find_webhook",
    "forget_deliveries",
    "list_webhooks",
    "new_secret",
    "outbound_event",
    "rotate_secret",
    "settle_delivery",
]

EventType = Literal[
    "fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"
]
EVENT_TYPES: tuple[EventType, ...] = (
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
)
WEBHOOKS_PER_TENANT = 20
# Deliveries that wait for one webhook; events beyond them are not sent to it.
PENDING_PER_WEBHOOK = 1000


@dataclass(frozen=True, slots=True)
class OutboundEvent:
    """One event for one webhook. `secrets`: each of them signs it."""

    id: str
    tenant_id: str
    webhook_id: str
    url: str
    body: str
    secrets: tuple[str, ...]
    attempts: int

    def __repr__(self) -> str:
        return f"OutboundEvent({self.id}, attempt {self.attempts})"


@dataclass(frozen=True, slots=True)
class DueWebhook:
    """A webhook with a delivery whose time has come, the first of them at `since_ms`."""

    id: str
    tenant_id: str
    since_ms: int


def new_secret() -> str:
    """A new signing secret, in the format of the standard-webhooks libraries and the `openai`
    client.
    """
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


async def add_webhook(
    session: AsyncSession, tenant_id: str, name: str, url: str, event_types: Sequence[EventType]
) -> Webhook:
    """Make a webhook with its own secret.

    Raises:
        RequestInvalid: the tenant has as many as it may.
    """
    count = await session.scalar(
        select(func.count()).select_from(Webhook).where(Webhook.tenant_id == tenant_id)
    )
    if (count or 0) >= WEBHOOKS_PER_TENANT:
        raise RequestInvalid(f"there are {count} webhooks, the maximum; delete one first")
    webhook = Webhook(
        id=new_id("we"),
        tenant_id=tenant_id,
        name=name,
        url=url,
        event_types=list(event_types),
        secret=new_secret(),
    )
    session.add(webhook)
    await session.flush()
    return webhook


async def find_webhook(session: AsyncSession, tenant_id: str, webhook_id: str) -> Webhook:
    """A tenant's webhook.

    Raises:
        NotFound: it has none of this id.
    """
    webhook = await session.scalar(
        select(Webhook).where(Webhook.tenant_id == tenant_id, Webhook.id == webhook_id)
    )
    if webhook is None:
        raise NotFound(f"there is no webhook endpoint {webhook_id[:80]!r}")
    return webhook


async def delete_webhook(session: AsyncSession, tenant_id: str, webhook_id: str) -> None:
    """Delete a tenant's webhook with its deliveries.

    Raises:
        NotFound: it has none of this id.
    """
    await session.delete(await find_webhook(session, tenant_id, webhook_id))


def change_webhook(webhook: Webhook, changes: Mapping[str, Any]) -> None:
    """Set columns of a webhook by name."""
    for name, value in changes.items():
        setattr(webhook, name, value)
    if changes:
        webhook.updated_ms = now_ms()


async def list_webhooks(
    session: AsyncSession, tenant_id: str, *, after: str | None = None, limit: int = 20
) -> tuple[Sequence[Webhook], bool]:
    """A page of a tenant's webhooks, the newest first, and whether there are more.

    Raises:
        NotFound: there is no webhook `after`.
    """
    query = select(Webhook).where(Webhook.tenant_id == tenant_id)
    if after is not None:
        last = await find_webhook(session, tenant_id, after)
        query = query.where(
            tuple_(Webhook.created_ms, Webhook.id) < tuple_(last.created_ms, last.id)
        )
    query = query.order_by(Webhook.created_ms.desc(), Webhook.id.desc()).limit(limit + 1)
    rows = (await session.scalars(query)).all()
    return rows[:limit], len(rows) > limit


def rotate_secret(webhook: Webhook, keep_old: bool) -> None:
    """Give it a new secret; with `keep_old` the old one signs as well for a day."""
    webhook.old_secret = webhook.secret if keep_old else None
    webhook.old_until_ms = now_ms() + DAY_MS if keep_old else None
    webhook.secret = new_secret()
    webhook.updated_ms = now_ms()


async def enqueue(
    session: AsyncSession, tenant_id: str, event_type: str, data: Mapping[str, Any]
) -> None:
    """Send an event to every webhook of the tenant that subscribes to its type and has fewer than
    PENDING_PER_WEBHOOK deliveries waiting.
    """
    rows = (await session.scalars(select(Webhook).where(Webhook.tenant_id == tenant_id))).all()
    wanting = [webhook for webhook in rows if event_type in webhook.event_types]
    if wanting:
        full = await _full(session, [webhook.id for webhook in wanting])
        wanting = [webhook for webhook in wanting if webhook.id not in full]
    if wanting:
        body = body_of(event_type, data)
        session.add_all(
            Delivery(id=new_id("msg"), webhook_id=webhook.id, event_type=event_type, body=body)
            for webhook in wanting
        )


def body_of(event_type: str, data: Mapping[str, Any]) -> str:
    """An event as it is sent."""
    event = {
        "id": new_id("evt"),
        "object": "event",
        "created_at": now_ms() // 1000,
        "type": event_type,
    }
    return json.dumps(event | {"data": dict(data)}, separators=(",", ":"))


def outbound_event(
    webhook: Webhook, body: str, delivery_id: str | None = None, attempts: int = 1
) -> OutboundEvent:
    """A delivery to send to a webhook."""
    signing = [webhook.secret]
    if webhook.old_secret is not None and (webhook.old_until_ms or 0) > now_ms():
        signing.append(webhook.old_secret)
    delivery = delivery_id or new_id("msg")
    return OutboundEvent(
        delivery, webhook.tenant_id, webhook.id, webhook.url, body, tuple(signing), attempts
    )


async def due_webhooks(session: AsyncSession) -> list[DueWebhook]:
    """The webhooks that have a delivery whose time has come, the one that has waited longest
    first.
    """
    since = func.min(Delivery.next_ms)
    query = select(Webhook.id, Webhook.tenant_id, since).join(
        Delivery, Delivery.webhook_id == Webhook.id
    )
    query = query.where(*_due()).group_by(Webhook.id, Webhook.tenant_id).order_by(since, Webhook.id)
    return [DueWebhook(*row) for row in (await session.execute(query)).all()]


async def claim_deliveries(
    session: AsyncSession, webhook_ids: Sequence[str], lease_seconds: float
) -> list[OutboundEvent]:
    """Take the first due delivery of each webhook. One that is not settled within the lease is
    taken again by any gateway.
    """
    place = func.row_number().over(
        partition_by=Delivery.webhook_id, order_by=(Delivery.next_ms, Delivery.id)
    )
    ranked = (
        select(Delivery.id, place.label("place"))
        .where(*_due(), Delivery.webhook_id.in_(webhook_ids))
        .subquery()
    )
    first = select(ranked.c.id).where(ranked.c.place == 1)
    query = select(Delivery).where(Delivery.id.in_(first), *_due())
    deliveries = (await session.scalars(query.with_for_update(of=Delivery, skip_locked=True))).all()
    for delivery in deliveries:
        delivery.attempts += 1
        delivery.next_ms = now_ms() + int(lease_seconds * 1000)
    await session.flush()
    return [outbound_event(each.webhook, each.body, each.id, each.attempts) for each in deliveries]


async def settle_delivery(
    session: AsyncSession,
    event: OutboundEvent,
    outcome: str,
    *,
    delivered: bool,
    again_in_seconds: float | None,
) -> None:
    """Record the result of an attempt: delivered, to be retried, or (None) abandoned."""
    delivery = await session.get(Delivery, event.id, with_for_update={"of": Delivery})
    if delivery is None or delivery.status != "pending" or delivery.attempts != event.attempts:
        return  # the webhook was deleted, or the attempt took so long that another was begun
    delivery.outcome = outcome[:255]
    if delivered or again_in_seconds is None:
        delivery.status = "delivered" if delivered else "failed"
        delivery.finished_ms = now_ms()
    else:
        delivery.next_ms = now_ms() + int(again_in_seconds * 1000)
    await session.flush()


async def forget_deliveries(session: AsyncSession, before_ms: int) -> None:
    """Remove the rows of deliveries that ended before then."""
    await session.execute(
        delete(Delivery).where(Delivery.status != "pending", Delivery.finished_ms < before_ms)
    )


async def _full(session: AsyncSession, webhook_ids: Sequence[str]) -> set[str]:
    waiting = select(Delivery.webhook_id).where(
        Delivery.webhook_id.in_(webhook_ids), Delivery.status == "pending"
    )
    waiting = waiting.group_by(Delivery.webhook_id).having(func.count() >= PENDING_PER_WEBHOOK)
    return set((await session.scalars(waiting)).all())


def _due() -> tuple[ColumnElement[bool], ...]:
    return (Delivery.status == "pending", Delivery.next_ms <= now_ms())
