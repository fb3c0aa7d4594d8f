"""One engine, over HTTP: is it well, load this version, unload it, answer this request."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from reft_serve.errors import AdapterInvalid, EngineFailed, EngineUnavailable
from reft_serve.observability import ENGINE_IN_FLIGHT, ENGINE_UP, LOAD_SECONDS, LOADS

__all__ = ["NAME_PREFIX", "Engine", "Upstream", "engine_name", "message_of"]

NAME_PREFIX = "reft-v-"
_PROBE_SECONDS, _LOAD_SECONDS = 5.0, 60.0


def engine_name(digest: str) -> str:
    """The name that engines know a version by: it says nothing of whose it is or what it is called."""
    return NAME_PREFIX + hashlib.sha256(f"engine name of {digest}".encode()).hexdigest()[:32]


class _Connections:
    """Connections to one engine, each a pool of one.

    httpx's own pool looks at all of its connections, each against all, for every request: at 16 requests at once that is
    most of a request's cost, at 256 it is prohibitive (encode/httpcore `_assign_requests_to_connections`).
    """

    def __init__(self, url: str, socket: str | None) -> None:
        self._socket = socket
        self._verify: ssl.SSLContext | bool = ssl.create_default_context() if url.startswith("https:") else False
        self._free: list[httpx.AsyncHTTPTransport] = []

    def take(self) -> httpx.AsyncHTTPTransport:
        """A connection of one's own; the one that was used last, so that the others can run out."""
        if self._free:
            return self._free.pop()
        # Less than the 5 s after which engines close an idle connection: else a request could meet the closing.
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=3.0)
        return httpx.AsyncHTTPTransport(verify=self._verify, trust_env=False, uds=self._socket, limits=limits)

    def give_back(self, connection: httpx.AsyncHTTPTransport) -> None:
        """Let others use it."""
        self._free.append(connection)

    async def close(self) -> None:
        """Close those that nobody uses."""
        while self._free:
            await self._free.pop().aclose()


class Upstream:
    """An answer that has begun: its status and its bytes."""

    def __init__(
        self, response: httpx.Response, connection: httpx.AsyncHTTPTransport, connections: _Connections
    ) -> None:
        self._response, self._connection, self._connections = response, connection, connections
        self.status = response.status_code
        self.is_stream = response.headers.get("content-type", "").startswith("text/event-stream")

    async def read(self) -> bytes:
        """All bytes.

        Raises:
            EngineFailed: the engine stopped before the end.
        """
        return b"".join([chunk async for chunk in self.chunks()])

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes as they come.

        Raises:
            EngineFailed: the engine stopped before the end.
        """
        try:
            async for chunk in self._response.aiter_raw():
                yield chunk
        except httpx.HTTPError as exc:
            raise EngineFailed("the engine stopped in the middle of its answer") from exc

    async def close(self) -> None:
        """End the connection; a request that is not finished is cancelled in the engine."""
        try:
            await self._response.aclose()
        finally:
            self._connections.give_back(self._connection)


class Engine:
    """A client of one engine, and what this gateway knows of it."""

    def __init__(self, number: int, url: str, key: str | None) -> None:
        self.name = f"engine-{number}"
        self.url = url
        self.healthy = False
        self.draining = False
        self.in_flight = 0
        self.base_name = ""
        self.uses: Counter[str] = Counter()
        self._loaded: set[str] = set()
        self._loading: dict[str, asyncio.Lock] = {}
        socket = url.removeprefix("unix:") if url.startswith("unix:") else None
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._root = "http://engine" if socket else url
        self._connections = _Connections(url, socket)
        self._http = httpx.AsyncClient(
            base_url=self._root,
            headers=self._headers,
            transport=httpx.AsyncHTTPTransport(uds=socket),
            timeout=httpx.Timeout(None, connect=5.0),
            trust_env=False,
        )

    async def probe(self) -> None:
        """Look at its health; an engine that is well again may be a new process, which holds no version of ours."""
        try:
            answer = await self._http.get("/health", timeout=_PROBE_SECONDS)
            well = answer.status_code == 200
            if well and not self.healthy:
                await self._learn()
        except (httpx.HTTPError, ValueError, KeyError):
            well = False
        self._set_health(well)

    async def _learn(self) -> None:
        cards = (await self._http.get("/v1/models", timeout=_PROBE_SECONDS)).raise_for_status().json()["data"]
        names = {card["id"] for card in cards}
        self.base_name = next(card["id"] for card in cards if not card.get("parent"))
        self._loaded = {name for name in names if name.startswith(NAME_PREFIX)}

    def fail(self) -> None:
        """Take it out until a probe finds it well."""
        self._set_health(False)

    def _set_health(self, well: bool) -> None:
        self.healthy = well
        ENGINE_UP.labels(self.name).set(well)

    def forget(self, name: str) -> None:
        """Note that it does not hold a version any more."""
        self._loaded.discard(name)

    @contextlib.contextmanager
    def using(self, name: str | None) -> Any:
        """Count a request in flight, of the version `name`."""
        self.in_flight += 1
        if name is not None:
            self.uses[name] += 1
        ENGINE_IN_FLIGHT.labels(self.name).set(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1
            if name is not None:
                self.uses[name] -= 1
                if not self.uses[name]:
                    del self.uses[name]
            ENGINE_IN_FLIGHT.labels(self.name).set(self.in_flight)

    async def load(self, name: str, path: Path) -> None:
        """Let it hold a version, if it does not yet.

        Raises:
            AdapterInvalid: it refuses the version; the faults are its own words, without the path.
            EngineUnavailable: it does not answer.
        """
        if name in self._loaded:
            return
        async with self._loading.setdefault(name, asyncio.Lock()):
            if name not in self._loaded:
                begun = time.monotonic()
                result = "failed"
                try:
                    await self._load(name, path)
                    result = "loaded"
                finally:
                    LOADS.labels(result).inc()
                    LOAD_SECONDS.observe(time.monotonic() - begun)
                self._loaded.add(name)
        self._loading.pop(name, None)

    async def _load(self, name: str, path: Path) -> None:
        body = {"lora_name": name, "lora_path": str(path)}
        try:
            answer = await self._http.post("/v1/load_lora_adapter", json=body, timeout=_LOAD_SECONDS)
        except httpx.HTTPError as exc:
            self.fail()
            raise EngineUnavailable("an engine does not answer; try again") from exc
        if answer.status_code == 200:
            return
        message = message_of(answer.content)
        if answer.status_code == 400 and "already been loaded" in message:
            return
        if answer.status_code == 400:
            faults = message.replace(str(path), "").partition("cannot be used:")[2] or message.replace(str(path), "it")
            raise AdapterInvalid("", [faults.strip()])
        raise EngineFailed(f"an engine could not load the adapter (it answered {answer.status_code})")

    async def unload(self, name: str) -> None:
        """Let it forget a version; one that does not answer has forgotten it."""
        self.forget(name)
        with contextlib.suppress(httpx.HTTPError):
            await self._http.post("/v1/unload_lora_adapter", json={"lora_name": name}, timeout=_LOAD_SECONDS)

    async def open(self, path: str, body: bytes, headers: dict[str, str]) -> Upstream:
        """Begin a request.

        Raises:
            EngineUnavailable: it did not begin to answer; another engine may be asked.
        """
        request = httpx.Request(
            "POST",
            self._root + path,
            content=body,
            headers={"content-type": "application/json", **self._headers, **headers},
            extensions={"timeout": {"connect": 5.0, "read": None, "write": None, "pool": None}},
        )
        connection = self._connections.take()
        try:
            return Upstream(await connection.handle_async_request(request), connection, self._connections)
        except httpx.HTTPError as exc:
            self._connections.give_back(connection)
            self.fail()
            raise EngineUnavailable("an engine stopped before it began to answer") from exc
        except BaseException:
            await connection.aclose()
            raise

    async def close(self) -> None:
        """Close its connections, and take it out of the metrics."""
        for gauge in (ENGINE_UP, ENGINE_IN_FLIGHT):
            with contextlib.suppress(KeyError):
                gauge.remove(self.name)
        await self._connections.close()
        await self._http.aclose()


def message_of(content: bytes) -> str:
    """The message in an engine's error, whichever of its shapes it has."""
    try:
        body = json.loads(content)
        found = body.get("error", body)
        return str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        return content[:500].decode(errors="replace")
