"""Events on their way to webhooks: signed, sent, and sent again until they are taken or given up.

Signed as https://www.standardwebhooks.com has it, which the `openai` client's `webhooks.unwrap` checks. A webhook's URL is a
tenant's word, so the address behind it is looked at with every attempt, and the connection is made to that very address:
nothing here reaches a network that is not public, whatever a name is made to stand for. Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import random
import socket
import time
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

import httpx

from reft_serve import __version__
from reft_serve.config import GatewaySettings
from reft_serve.database import webhooks
from reft_serve.database.connection import Database
from reft_serve.database.webhooks import Parcel
from reft_serve.errors import RequestInvalid
from reft_serve.observability import WEBHOOKS

__all__ = ["Notifier", "check_url"]

_log = logging.getLogger(__name__)
_POLL_SECONDS, _LEASE_SECONDS, _SEND_SECONDS = 1.0, 60.0, 15.0
_MOST_ATTEMPTS, _LONGEST_WAIT = 10, 36_000.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GONE = 410
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Notifier:
    """Sends what is due, while it is started."""

    def __init__(self, database: Database, settings: GatewaySettings) -> None:
        self._database, self._settings = database, settings
        self._random = random.Random()  # noqa: S311 - it only spreads attempts
        self._http: httpx.AsyncClient | None = None
        self._sending: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send."""
        self._sending = asyncio.create_task(self._send_forever())

    async def close(self) -> None:
        """Stop. What was not settled is sent again by whoever comes."""
        if self._sending is not None:
            self._sending.cancel()
            with suppress(asyncio.CancelledError):
                await self._sending
        if self._http is not None:
            await self._http.aclose()

    async def send(self, parcel: Parcel) -> tuple[int | None, str]:
        """Send an event once: (the answer's status, or None where there was none; a few words for people)."""
        try:
            async with asyncio.timeout(_SEND_SECONDS):
                status = await self._post(parcel)
        except TimeoutError:
            return None, f"no answer within {_SEND_SECONDS:.0f} seconds"
        except RequestInvalid as exc:
            return None, str(exc)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as exc:
            return None, f"the connection failed ({type(exc).__name__})"
        return status, f"answered {status}"

    async def _post(self, parcel: Parcel) -> int:
        if self._http is None:
            limits = httpx.Limits(max_keepalive_connections=0)
            self._http = httpx.AsyncClient(trust_env=False, limits=limits, timeout=_SEND_SECONDS)
        parts = check_url(parcel.url, self._settings)
        host = parts.hostname or ""
        address = await _public_address(host, parts, self._settings)
        shown = f"[{address}]" if address.version == 6 else str(address)
        port = f":{parts.port}" if parts.port else ""
        url = httpx.URL(parts._replace(netloc=f"{shown}{port}", fragment="").geturl())
        body = parcel.body.encode()
        headers = _signed(parcel, body) | {"host": parts.netloc, "content-type": "application/json"}
        extensions = {"sni_hostname": host}
        async with self._http.stream("POST", url, content=body, headers=headers, extensions=extensions) as answer:
            return answer.status_code  # nobody needs what it says, however long that is

    async def _send_forever(self) -> None:
        while True:
            try:
                busy = await self._send_some()
            except Exception:
                _log.exception("webhooks cannot be delivered; trying again")
                busy = False
            if not busy:
                await asyncio.sleep(_POLL_SECONDS)

    async def _send_some(self) -> bool:
        """Send what is due; False where nothing was."""
        async with self._database.reading() as session:  # SQLite has one writer at a time: not for a mere look
            if not await webhooks.is_any_due(session):
                return False
        async with self._database.writing() as session:
            parcels = await webhooks.claim_deliveries(session, _LEASE_SECONDS)
        await asyncio.gather(*(self._deliver(parcel) for parcel in parcels))
        return bool(parcels)

    async def _deliver(self, parcel: Parcel) -> None:
        status, outcome = await self.send(parcel)
        delivered = status is not None and 200 <= status < 300
        wait = None if delivered or status == _GONE else self._wait(parcel.attempts)
        result = "delivered" if delivered else "given_up" if wait is None else "retried"
        WEBHOOKS.labels(result).inc()
        async with self._database.writing() as session:
            await webhooks.settle_delivery(session, parcel, outcome, delivered=delivered, again_in_seconds=wait)

    def _wait(self, attempts: int) -> float | None:
        """Seconds until the next attempt; None after the last."""
        if attempts >= _MOST_ATTEMPTS:
            return None
        wait = min(self._settings.webhook_retry_seconds * 6.0 ** (attempts - 1), _LONGEST_WAIT)
        return wait * self._random.uniform(0.9, 1.1)


def check_url(url: str, settings: GatewaySettings) -> SplitResult:
    """A webhook's URL in its parts, as far as it can be judged without asking for its name's address.

    Raises:
        RequestInvalid: it can be no webhook's.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        httpx.URL(url)
        (host or "").encode("idna")  # as it is when its address is asked for; labels have at most 63 bytes
    except (ValueError, httpx.InvalidURL) as exc:
        raise RequestInvalid("this is not a URL", "url") from exc
    lax = settings.webhooks_to_private_addresses
    if parts.scheme != "https" and not (lax and parts.scheme == "http"):
        raise RequestInvalid("a webhook's URL begins with https://", "url")
    if not host or parts.username is not None or parts.password is not None:
        raise RequestInvalid("a webhook's URL has a host, and no user or password", "url")
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:  # a name, whose address is looked at when something is sent there
        return parts
    _check_address(literal, settings)
    return parts


async def _public_address(host: str, parts: SplitResult, settings: GatewaySettings) -> _Address:
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    for address in addresses:
        _check_address(address, settings)
    return addresses[0]


def _check_address(address: _Address, settings: GatewaySettings) -> None:
    meant = _unwrapped(address)
    if not settings.webhooks_to_private_addresses and (not meant.is_global or meant.is_multicast):
        raise RequestInvalid("webhooks go to public addresses only, and this is none", "url")


def _unwrapped(address: _Address) -> _Address:
    """The IPv4 address that an IPv6 one carries, where it carries one."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1] or address
    return address


def _signed(parcel: Parcel, body: bytes) -> dict[str, str]:
    moment = str(int(time.time()))
    content = f"{parcel.id}.{moment}.".encode() + body
    signatures = []
    for secret in parcel.secrets:
        key = base64.b64decode(secret.removeprefix("whsec_"))
        signatures.append("v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode())
    return {
        "webhook-id": parcel.id,
        "webhook-timestamp": moment,
        "webhook-signature": " ".join(signatures),
        "user-agent": f"reft-serve/{__version__}",
    }
