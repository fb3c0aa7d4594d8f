"""How a gateway leaves: it says so first, goes on answering while balancers notice, and then finishes what it has begun.

On SIGTERM, for `notice_seconds`: `/health/ready` answers 503, new requests are still served, and every answer closes its
connection, so that callers come back over another gateway. Only then is the socket closed, as uvicorn does it: requests under
way go on, for `drain_seconds` at most. A second signal, or Ctrl-C, skips the notice.
"""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from reft_serve.config import GatewaySettings

__all__ = ["serve"]


def serve(app: FastAPI, host: str, port: int, settings: GatewaySettings) -> bool:
    """Serve until a signal says to end; False where the application did not start."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
    )
    server = _Server(config, app.state, settings.notice_seconds)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    return server.started


class _Server(uvicorn.Server):
    """uvicorn with a notice before it closes its socket."""

    def __init__(self, config: uvicorn.Config, state: Any, notice_seconds: float) -> None:
        super().__init__(config)
        self._state, self._notice_seconds = state, notice_seconds
        self._ends: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve."""
        await super().startup(sockets)
        # What is there now stays. To look at it again and again would hold requests up, each time for some 20 ms.
        gc.collect()
        gc.freeze()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to leave."""
        first = self._ends is None and not self.should_exit
        super().handle_exit(sig, frame)
        services = getattr(self._state, "services", None)
        if services is not None and first and sig == signal.SIGTERM:
            services.draining = True
            self._ends = time.monotonic() + self._notice_seconds
            self.should_exit = self._notice_seconds == 0

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether to close the socket now."""
        if self._ends is not None and time.monotonic() >= self._ends:
            self.should_exit = True
        return await super().on_tick(counter)
