"""Graceful shutdown of a gateway: report it, keep serving while load balancers notice, then finish
the open requests.

On SIGTERM, for `notice_seconds`: `/health/ready` answers 503, new requests are still served, and
every answer closes its connection, so that callers come back over another gateway. Only then is the
socket closed, as uvicorn does it: requests under way continue, for `drain_seconds` at most, and the
process waits, within the same time, until callers have taken what the kernel still holds: a
container's network ends with it, and the rest of an answer would be lost. A second signal, or
Ctrl-C, skips the notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import resource
import signal
import socket
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from reft_serve.config import GatewaySettings
from reft_serve.gateway.http.connections import Connections, protocol_of

__all__ = ["serve", "unsent_bytes"]

_POLL_SECONDS = 0.1
_SOCKET_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))

_log = logging.getLogger(__name__)


def serve(app: FastAPI, host: str, port: int, settings: GatewaySettings) -> bool:
    """Serve until a signal says to end; False where the application did not start."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # each request has a connection here and one to an engine
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    config = uvicorn.Config(
        app,
        http=protocol_of(Connections(settings)),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
    )
    server = _Server(config, app.state, settings)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    return server.started


class _Server(uvicorn.Server):
    """uvicorn with a notice before it closes its socket."""

    def __init__(self, config: uvicorn.Config, state: Any, settings: GatewaySettings) -> None:
        super().__init__(config)
        self._state = state
        self._notice_seconds = settings.notice_seconds
        self._drain_seconds = settings.drain_seconds
        self._ports: set[int] = set()
        self._ends: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        self._ports = {sock.getsockname()[1] for server in self.servers for sock in server.sockets}
        _log.info("listening", extra={"data": {"addresses": _addresses(self)}})
        # What is there now stays. To look at it again and again would hold requests up, each time
        # for some 20 ms.
        gc.collect()
        gc.freeze()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        first = self._ends is None and not self.should_exit
        super().handle_exit(sig, frame)
        services = getattr(self._state, "services", None)
        if services is not None and first and sig == signal.SIGTERM:
            services.drain()
            self._ends = time.monotonic() + self._notice_seconds
            self.should_exit = self._notice_seconds == 0

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether to close the socket now."""
        if self._ends is not None and time.monotonic() >= self._ends:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what has begun, and wait until it has arrived."""
        ends = time.monotonic() + self._drain_seconds
        await super().shutdown(sockets)
        while not self.force_exit and time.monotonic() < ends and unsent_bytes(self._ports):
            await asyncio.sleep(_POLL_SECONDS)


def unsent_bytes(ports: set[int]) -> int:
    """Bytes in the kernel's send queues of connections to these local ports, also of those that are
    closed here. 0 if the kernel does not say.
    """
    total = 0
    for table in _SOCKET_TABLES:
        with contextlib.suppress(OSError):
            for line in table.read_text().splitlines()[1:]:
                _, local, _, _, queues, *_ = line.split()
                if int(local.rpartition(":")[2], 16) in ports:
                    total += int(queues.partition(":")[0], 16)
    return total


def _addresses(server: uvicorn.Server) -> list[str]:
    names = [each.getsockname() for listening in server.servers for each in listening.sockets]
    return [
        f"http://[{name[0]}]:{name[1]}" if ":" in name[0] else f"http://{name[0]}:{name[1]}"
        for name in names
    ]
