"""Client connections: uvicorn's HTTP protocol with a bound on what a caller sends before a request
is complete.

uvicorn's own protocol over httptools takes headers without end and waits for them without end. Here
bytes are counted as they arrive, one timer for all connections closes those that ask for nothing,
and at the bound on connections the one that has waited longest without a request makes room for the
next.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time
from collections import Counter, OrderedDict
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from reft_serve import errors
from reft_serve.config import GatewaySettings
from reft_serve.gateway.schemas.errors import error_body, status_of

__all__ = [
    "HEADER_LINES",
    "LINGER_SECONDS",
    "PIPELINED_REQUESTS",
    "WRITE_SECONDS",
    "Connections",
    "peer_left",
    "protocol_of",
]

HEADER_LINES = 128
"""Largest number of header lines in a request."""
PIPELINED_REQUESTS = 16
"""Largest number of pipelined requests on a connection."""
WRITE_SECONDS = 120.0
"""Time in seconds after which a connection with an unread response is closed."""
LINGER_SECONDS = 2.0
"""Seconds for which a refused connection is read, so that the client gets the response."""
_SWEEP_SECONDS = 0.5
_SLICE = 32 << 10
_ESTABLISHED = 1


class Connections:
    """Every client connection of a process."""

    def __init__(self, settings: GatewaySettings) -> None:
        # Half of the descriptors stay for the engines, the database and files.
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = max(1, min(settings.max_connections, descriptors // 2))
        self.most_per_address = settings.connections_per_address
        self.header_bytes = settings.max_header_bytes
        self.header_seconds = settings.header_seconds
        self.open: set[_Protocol] = set()
        self.waiting: OrderedDict[_Protocol, float] = OrderedDict()
        self.stalled: OrderedDict[_Protocol, float] = OrderedDict()
        self._by_address: Counter[str] = Counter()
        self._sweeping: asyncio.TimerHandle | None = None

    def admit(self, connection: _Protocol, address: str) -> bool:
        """Count a new connection; if there are too many, close the one that has waited longest
        without a request.

        Returns:
            False if every connection has a request in progress, so there is no room.
        """
        crowded = len(self.open) >= self.most
        full_address = address if self._by_address[address] >= self.most_per_address else None
        if (crowded or full_address is not None) and not self._evict(full_address):
            return False
        self.open.add(connection)
        self._by_address[address] += 1
        self.wait(connection)
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)
        return True

    def forget(self, connection: _Protocol, address: str) -> None:
        """Stop counting a connection that has ended."""
        self.waiting.pop(connection, None)
        self.stalled.pop(connection, None)
        if connection in self.open:
            self.open.discard(connection)
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def wait(self, connection: _Protocol) -> None:
        """The connection has no request in progress from now on."""
        self.waiting[connection] = time.monotonic()

    def _evict(self, address: str | None) -> bool:
        oldest = next(
            (each for each in self.waiting if address is None or each.address == address), None
        )
        if oldest is None:
            return False
        self.forget(oldest, oldest.address)
        oldest.transport.abort()
        return True

    def _sweep(self) -> None:
        self._sweeping = (
            asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)
            if self.open
            else None
        )
        now = time.monotonic()
        while self.waiting:
            connection, since = next(iter(self.waiting.items()))
            if since + self.header_seconds > now:
                break
            del self.waiting[connection]
            connection.give_up()
        while self.stalled:
            connection, since = next(iter(self.stalled.items()))
            if since + WRITE_SECONDS > now:
                break
            del self.stalled[connection]
            connection.transport.abort()


class _Protocol(HttpToolsProtocol):
    connections_of_process: Connections

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.address = ""
        self._refused = False
        # Bytes that came since a head was complete or a body went on.
        self._idle_bytes = 0
        self._in_head = True
        self._extensions: dict[str, Any] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it, or refuse it."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self._extensions = {"reft.socket": {"socket": transport.get_extra_info("socket")}}
        if not self.connections_of_process.admit(self, self.address):
            self._refuse(
                errors.TooManyConnections("the gateway has too many connections; try again")
            )

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections_of_process.forget(self, self.address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes in slices, so that limits are enforced early."""
        if self._refused:
            return
        self._unset_keepalive_if_required()
        if len(data) <= _SLICE:
            self._feed(data)
            return
        view = memoryview(data)
        for start in range(0, len(data), _SLICE):
            self._feed(view[start : start + _SLICE])
            if self._refused or self.transport.is_closing():
                return

    def _feed(self, data: bytes | memoryview) -> None:
        self._idle_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._unsupported_upgrade_warning()
        except httptools.HttpParserError as exc:
            fault = exc.__context__
            self._refuse(
                fault
                if isinstance(fault, errors.ReftError)
                else errors.RequestInvalid("the request is not valid HTTP")
            )
            return
        if self._idle_bytes > self.connections_of_process.header_bytes:
            self._refuse(self._too_large())

    def _too_large(self) -> errors.HeadersTooLarge:
        most = self.connections_of_process.header_bytes
        return errors.HeadersTooLarge(
            f"the request line and headers may have at most {most} bytes in {HEADER_LINES} lines"
        )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self.scope["extensions"] = self._extensions

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; those after a body have no meaning here."""
        if not self._in_head:
            return
        if len(self.headers) >= HEADER_LINES:
            raise self._too_large()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= PIPELINED_REQUESTS:
            raise errors.RequestInvalid(
                f"at most {PIPELINED_REQUESTS} requests may be pipelined on a connection"
            )
        self._in_head = False
        self._idle_bytes = 0
        self.connections_of_process.waiting.pop(self, None)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is there as a whole."""
        self._in_head = True
        self._idle_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start the next request, or wait for one."""
        super().on_response_complete()
        if not self.pipeline and self.cycle.response_complete and not self.transport.is_closing():
            self.connections_of_process.wait(self)

    def pause_writing(self) -> None:
        """The caller does not read."""
        self.connections_of_process.stalled[self] = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        """The caller reads again."""
        self.connections_of_process.stalled.pop(self, None)
        super().resume_writing()

    def give_up(self) -> None:
        """Close a connection whose request did not come in time."""
        if self._idle_bytes and self._in_head:
            seconds = self.connections_of_process.header_seconds
            self._refuse(
                errors.RequestTimeout(f"the request headers did not arrive within {seconds:g} s")
            )
        else:
            self.transport.close()

    def _refuse(self, exc: errors.ReftError) -> None:
        """Answer, if nothing else is being answered, and end the connection."""
        self._refused = True
        cycle = self.cycle
        answerable = not self.pipeline and (
            cycle is None or cycle.response_complete or not cycle.response_started
        )
        self.pipeline.clear()
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self.connections_of_process.waiting.pop(self, None)
        if not answerable or self.transport.is_closing():
            self.transport.close()
            return
        status = status_of(exc)
        body = json.dumps(error_body(status, str(exc), None, exc.code)).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        # To close a socket with unread bytes would reset it, and the caller would not see the
        # answer.
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


def protocol_of(connections: Connections) -> type[_Protocol]:
    """The protocol class for uvicorn's `http`."""
    return type("Protocol", (_Protocol,), {"connections_of_process": connections})


def peer_left(scope: Any) -> bool:
    """True if the client has closed its side, even if its request is not read to the end."""
    sock = (scope.get("extensions") or {}).get("reft.socket", {}).get("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        state: int = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except (OSError, ValueError):
        return True
    return state != _ESTABLISHED
