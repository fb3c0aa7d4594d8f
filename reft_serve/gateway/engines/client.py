"""HTTP to one engine: whole answers, and answers that are read as they come, over connections that
are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp

from reft_serve.errors import EngineFailed, EngineTrouble, EngineUnavailable

__all__ = ["EngineClient", "EngineResponse"]

_CONNECT_SECONDS = 5.0
# Less than the 5 s after which engines close an idle connection: else a request could meet the
# closing.
_KEEP_ALIVE_SECONDS = 3.0
_BROKEN = (aiohttp.ClientError, OSError, TimeoutError)
_UNREACHED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_STOPPED = "the engine stopped in the middle of its response"


class EngineResponse:
    """An answer that has begun: its status, its length if the engine says so, and its bytes."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.length = response.content_length
        self.is_stream = response.headers.get("content-type", "").startswith("text/event-stream")

    async def read(self) -> bytes:
        """All bytes.

        Raises:
            EngineFailed: the engine stopped before the end.
        """
        try:
            return await self._response.read()
        except _BROKEN as exc:
            raise EngineFailed(_STOPPED) from exc

    async def chunk(self) -> bytes:
        """All bytes that have come since the last call, as soon as there are any; none at the end.

        Raises:
            EngineFailed: the engine stopped before the end.
        """
        try:
            return await self._response.content.readany()
        except _BROKEN as exc:
            raise EngineFailed(_STOPPED) from exc

    def close(self) -> None:
        """Leave it. Where the answer has not ended the connection is closed, by which the engine
        knows to stop.
        """
        self._response.close()


class EngineClient:
    """The connections to one engine. To be made and used in one event loop."""

    def __init__(self, url: str, key: str | None) -> None:
        """Connect lazily.

        Args:
            url: `http://HOST:PORT`, `https://...` or `unix:/PATH`.
            key: the engine's own API key.
        """
        socket = url.removeprefix("unix:") if url.startswith("unix:") else None
        self._root = "http://engine" if socket else url
        kept: dict[str, Any] = {"limit": 0, "keepalive_timeout": _KEEP_ALIVE_SECONDS}
        self._client = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(socket, **kept)
            if socket
            else aiohttp.TCPConnector(**kept),
            headers={"content-type": "application/json"}
            | ({} if key is None else {"authorization": f"Bearer {key}"}),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("accept-encoding", "user-agent"),
        )

    async def fetch(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float
    ) -> tuple[int, bytes]:
        """(status, all bytes) of a small answer.

        Raises:
            EngineUnavailable: it is not there within `seconds`. `delivered`: it may have had what
                was asked.
        """
        limit = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._client.request(
                method, self._root + path, json=body, timeout=limit
            ) as answer:
                return answer.status, await answer.read()
        except _UNREACHED as exc:
            raise EngineUnavailable(
                "an engine does not respond; try again", trouble=_trouble(exc)
            ) from exc
        except _BROKEN as exc:
            trouble = _trouble(exc)
            broken = trouble != "timed_out"
            raise EngineUnavailable(
                "an engine does not respond; try again", delivered=broken, trouble=trouble
            ) from exc

    async def open(self, path: str, body: bytes, headers: Mapping[str, str]) -> EngineResponse:
        """Post a request and return when its answer begins.

        Raises:
            EngineUnavailable: it did not begin to answer. `delivered` says whether the request may
                have reached it.
        """
        try:
            return EngineResponse(
                await self._client.post(
                    self._root + path, data=body, headers=headers, allow_redirects=False
                )
            )
        except _UNREACHED as exc:
            raise EngineUnavailable(
                "an engine cannot be reached; try again", trouble=_trouble(exc)
            ) from exc
        except _BROKEN as exc:
            sentence = "an engine stopped before it responded; try again"
            raise EngineUnavailable(sentence, delivered=True, trouble=_trouble(exc)) from exc

    async def close(self) -> None:
        await self._client.close()


def _trouble(exc: Exception) -> EngineTrouble:
    match exc:
        case TimeoutError():
            return "timed_out"
        case aiohttp.ClientConnectorDNSError():
            return "unknown_host"
        case aiohttp.ClientSSLError():
            return "certificate"
        case aiohttp.ClientConnectorError():
            return "unreachable"
        case _:
            return "broken"
