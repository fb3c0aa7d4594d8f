"""Streamed responses, and callers that disconnect: the work for them is cancelled, once, and may
clean up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress

from fastapi import Response
from starlette.types import Receive, Scope, Send

__all__ = ["ClientGone", "Streamed", "while_there"]

# A block that ends sooner is not watched: the task that watches costs more than it could save.
_WATCH_AFTER_SECONDS = 0.02


class ClientGone(Exception):
    """The caller has closed the connection."""


@asynccontextmanager
async def while_there(receive: Receive) -> AsyncIterator[None]:
    """A block that is cancelled when the caller leaves; the request's body has been read.

    Raises:
        ClientGone: it left, and the block has cleaned up.
    """
    working = asyncio.current_task()
    assert working is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        working.cancel()

    watching: asyncio.Task[None] | None = None

    def begin() -> None:
        nonlocal watching
        watching = asyncio.create_task(watch())

    beginning = asyncio.get_running_loop().call_later(_WATCH_AFTER_SECONDS, begin)
    try:
        yield
    except asyncio.CancelledError:
        if gone and not working.uncancel():
            raise ClientGone from None
        raise
    finally:
        beginning.cancel()
        if watching is not None and not watching.done():
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching


class Streamed(Response):
    """Server-sent events. `relay` sends them with the function that it is given; `finish` is called
    once that has ended, however it came.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        relay: Callable[[Callable[[bytes], Awaitable[None]]], Awaitable[None]],
        headers: Mapping[str, str],
        finish: Callable[[], Awaitable[None]],
    ) -> None:
        self._relay = relay
        self._finish = finish
        self.status_code = 200
        self.body = b""
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        """As Response's, except content-length, which is unknown."""
        all_headers = {"content-type": "text/event-stream; charset=utf-8", **(headers or {})}
        self.raw_headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in all_headers.items()
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the caller leaves."""

        async def emit(events: bytes) -> None:
            await send({"type": "http.response.body", "body": events, "more_body": True})

        try:
            async with while_there(receive):
                await send(
                    {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                )
                await self._relay(emit)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            pass
        finally:
            await self._finish()
