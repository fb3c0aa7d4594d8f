"""Delivery of events to webhooks: signed, sent, and retried until they are accepted or abandoned.

Signed as https://www.standardwebhooks.com has it, which the `openai` client's `webhooks.unwrap`
checks. A webhook's URL is a tenant's input, so its name is resolved at every attempt, and the
connection is made to the very address that was checked: nothing here reaches a network that is not
public, even if a name is changed. Redirects are not followed.

Each endpoint gets one event at a time and each tenant a few, so a silent endpoint delays only
itself.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import random
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

import httpx

from reft_serve import __version__
from reft_serve.config import GatewaySettings
from reft_serve.database import webhooks
from reft_serve.database.connection import Database
from reft_serve.database.webhooks import DueWebhook, OutboundEvent
from reft_serve.errors import RateLimited, RequestInvalid
from reft_serve.gateway.events.addresses import Address, Resolver, is_public
from reft_serve.observability import WEBHOOKS

__all__ = [
    "SENDERS",
    "SENDERS_PER_TENANT",
    "SEND_SECONDS",
    "TESTS_PER_TENANT",
    "WebhookSender",
    "check_url",
    "choose",
]

_log = logging.getLogger(__name__)
SENDERS = 100
SENDERS_PER_TENANT = 4
TESTS_PER_TENANT = 2
SEND_SECONDS = 15.0
_POLL_SECONDS = 1.0
_LEASE_SECONDS = 60.0
_MOST_ATTEMPTS = 10
_LONGEST_WAIT = 36_000.0
_HTTPS = 443
_FIRST_UNPRIVILEGED = 1024
_GONE = 410


class WebhookSender:
    """Sends what is due, while it is started."""

    def __init__(self, database: Database, settings: GatewaySettings) -> None:
        self._database = database
        self._settings = settings
        self._random = random.Random()  # noqa: S311 - it only spreads attempts
        self._http: httpx.AsyncClient | None = None
        self._resolver = Resolver()
        self._claiming: asyncio.Task[None] | None = None
        self._senders: set[asyncio.Task[None]] = set()
        self._busy: set[str] = set()
        self._by_tenant: Counter[str] = Counter()
        self._tests: Counter[str] = Counter()
        self._freed = asyncio.Event()

    def start(self) -> None:
        self._claiming = asyncio.create_task(self._claim_forever())

    async def close(self) -> None:
        """Stop. What was not settled is sent again by any gateway."""
        tasks = [*self._senders, *([] if self._claiming is None else [self._claiming])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._resolver.close()
        if self._http is not None:
            await self._http.aclose()

    async def test(self, event: OutboundEvent) -> tuple[int | None, str]:
        """Send an event immediately and once, outside the queue; returns the result of `send`.

        Raises:
            RateLimited: TESTS_PER_TENANT tests of this tenant have no answer yet.
        """
        if self._tests[event.tenant_id] >= TESTS_PER_TENANT:
            raise RateLimited(
                f"{TESTS_PER_TENANT} webhook tests are in progress; wait for their responses", 1.0
            )
        self._tests[event.tenant_id] += 1
        try:
            return await self.send(event)
        finally:
            _decrease(self._tests, event.tenant_id)

    async def send(self, event: OutboundEvent) -> tuple[int | None, str]:
        """Send an event once: (the answer's status, or None if there was none; a few words for
        people).
        """
        try:
            async with asyncio.timeout(SEND_SECONDS):
                status = await self._post(event)
        except TimeoutError:
            return None, f"no response within {SEND_SECONDS:.0f} seconds"
        except (RequestInvalid, RateLimited) as exc:
            return None, str(exc)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as exc:
            return None, f"the connection failed ({type(exc).__name__})"
        return status, f"answered {status}"

    async def _post(self, event: OutboundEvent) -> int:
        if self._http is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            self._http = httpx.AsyncClient(trust_env=False, limits=limits, timeout=SEND_SECONDS)
        parts = check_url(event.url, self._settings)
        host = parts.hostname or ""
        address = await self._address(event.tenant_id, host, parts)
        shown = f"[{address}]" if address.version == 6 else str(address)
        port = f":{parts.port}" if parts.port else ""
        url = httpx.URL(parts._replace(netloc=f"{shown}{port}", fragment="").geturl())
        body = event.body.encode()
        headers = _signed(event, body) | {"host": parts.netloc, "content-type": "application/json"}
        extensions = {"sni_hostname": host}
        async with self._http.stream(
            "POST", url, content=body, headers=headers, extensions=extensions
        ) as answer:
            return answer.status_code  # nobody needs what it says, however long that is

    async def _address(self, tenant_id: str, host: str, parts: SplitResult) -> Address:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        addresses = await self._resolver.addresses(tenant_id, host, port)
        for address in addresses:
            _check_address(address, self._settings)
        return addresses[0]

    async def _claim_forever(self) -> None:
        while True:
            self._freed.clear()
            try:
                await self._claim()
            except Exception:
                _log.exception("webhooks cannot be delivered; retrying")
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_SECONDS):
                    await self._freed.wait()

    async def _claim(self) -> None:
        """Give a sender to each delivery that may go now."""
        # SQLite has one writer at a time: not for a mere look
        async with self._database.reading() as session:
            due = await webhooks.due_webhooks(session)
        chosen = choose(due, self._busy, self._by_tenant, SENDERS - len(self._senders))
        if not chosen:
            return
        async with self._database.writing() as session:
            events = await webhooks.claim_deliveries(session, chosen, _LEASE_SECONDS)
        for event in events:
            self._busy.add(event.webhook_id)
            self._by_tenant[event.tenant_id] += 1
            sender = asyncio.create_task(self._deliver(event))
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)

    async def _deliver(self, event: OutboundEvent) -> None:
        try:
            await self._attempt(event)
        except Exception:
            _log.exception("a webhook delivery attempt was not recorded; it will be repeated")
        finally:
            self._busy.discard(event.webhook_id)
            _decrease(self._by_tenant, event.tenant_id)
            self._freed.set()

    async def _attempt(self, event: OutboundEvent) -> None:
        status, outcome = await self.send(event)
        delivered = status is not None and 200 <= status < 300
        wait = None if delivered or status == _GONE else self._wait(event.attempts)
        result = "delivered" if delivered else "given_up" if wait is None else "retried"
        WEBHOOKS.labels(result).inc()
        async with self._database.writing() as session:
            await webhooks.settle_delivery(
                session, event, outcome, delivered=delivered, again_in_seconds=wait
            )

    def _wait(self, attempts: int) -> float | None:
        """Seconds until the next attempt; None after the last."""
        if attempts >= _MOST_ATTEMPTS:
            return None
        wait = min(self._settings.webhook_retry_seconds * 6.0 ** (attempts - 1), _LONGEST_WAIT)
        return wait * self._random.uniform(0.9, 1.1)


def choose(
    due: Sequence[DueWebhook], busy: Collection[str], by_tenant: Mapping[str, int], room: int
) -> list[str]:
    """The webhooks that get a sender now: of the tenant with the fewest senders first, then the one
    that has waited longest.

    Args:
        due: the one that has waited longest first.
        busy: webhooks that have a sender; each gets one.
        by_tenant: the senders of each tenant; each gets at most SENDERS_PER_TENANT.
        room: senders that are free.
    """
    taken = Counter(by_tenant)
    ranked: list[tuple[int, int, str]] = []
    for place, webhook in enumerate(due):
        if webhook.id not in busy and taken[webhook.tenant_id] < SENDERS_PER_TENANT:
            ranked.append((taken[webhook.tenant_id], place, webhook.id))
            taken[webhook.tenant_id] += 1
    return [webhook_id for _, _, webhook_id in sorted(ranked)[: max(0, room)]]


def _decrease(counts: Counter[str], name: str) -> None:
    counts[name] -= 1
    if not counts[name]:
        del counts[name]


def check_url(url: str, settings: GatewaySettings) -> SplitResult:
    """Parse a webhook URL and check what needs no DNS lookup.

    Raises:
        RequestInvalid: it can be no webhook's.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
        httpx.URL(url)
        # as it is when its address is asked for; labels have at most 63 bytes
        (host or "").encode("idna")
    except (ValueError, httpx.InvalidURL) as exc:
        raise RequestInvalid("the webhook's URL is invalid", "url") from exc
    lax = settings.webhooks_to_private_addresses
    if parts.scheme != "https" and not (lax and parts.scheme == "http"):
        raise RequestInvalid("the URL of a webhook must begin with https://", "url")
    if not host or parts.username is not None or parts.password is not None:
        raise RequestInvalid("the URL of a webhook must have a host and no user or password", "url")
    if not lax and parts.port not in (None, _HTTPS) and (parts.port or 0) < _FIRST_UNPRIVILEGED:
        raise RequestInvalid(
            f"the port of a webhook must be {_HTTPS}, or {_FIRST_UNPRIVILEGED} or more", "url"
        )
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:  # a name, whose address is looked at when something is sent there
        return parts
    _check_address(literal, settings)
    return parts


def _check_address(address: Address, settings: GatewaySettings) -> None:
    if not settings.webhooks_to_private_addresses and not is_public(address):
        raise RequestInvalid("webhooks can only be sent to public addresses", "url")


def _signed(event: OutboundEvent, body: bytes) -> dict[str, str]:
    moment = str(int(time.time()))
    content = f"{event.id}.{moment}.".encode() + body
    signatures = []
    for secret in event.secrets:
        key = base64.b64decode(secret.removeprefix("whsec_"))
        signatures.append(
            "v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
        )
    return {
        "webhook-id": event.id,
        "webhook-timestamp": moment,
        "webhook-signature": " ".join(signatures),
        "user-agent": f"reft-serve/{__version__}",
    }
