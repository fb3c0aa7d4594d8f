"""One engine, over HTTP: is it well, load this version, unload it, answer this request."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reft_serve.adapters.engine_card import EngineCard, read_card
from reft_serve.adapters.engine_fault import EngineFault
from reft_serve.database.names import ENGINE_PREFIX
from reft_serve.errors import AdapterInvalid, EngineFailed, EngineTrouble, EngineUnavailable
from reft_serve.gateway.engines.client import EngineClient, EngineResponse
from reft_serve.gateway.engines.state import EngineState
from reft_serve.gateway.engines.tokens import Tokens
from reft_serve.observability import ENGINE_IN_FLIGHT, ENGINE_UP, LOAD_SECONDS, LOADS

__all__ = ["NAME_PREFIX", "Engine", "engine_name"]

NAME_PREFIX = ENGINE_PREFIX
_PROBE_SECONDS = 5.0
_LOAD_SECONDS = 60.0
_USAGE_SECONDS = 0.5
# A request that meets the closing of an idle connection fails at once.
_CLOSING_SECONDS = 0.5
_KEY_REFUSED = (401, 403)


def engine_name(digest: str) -> str:
    """The name that engines know a version by: it says nothing of whose it is or what it is
    called.
    """
    return NAME_PREFIX + hashlib.sha256(f"engine name of {digest}".encode()).hexdigest()[:32]


class Engine:
    """A client of one engine, and what this gateway knows of it."""

    def __init__(self, number: int, url: str, key: str | None) -> None:
        self.name = f"engine-{number}"
        self.url = url
        self.state = EngineState(self.name, url)
        self.healthy = False
        self.draining = False
        self.in_flight = 0
        self._company = 0
        self.base_name = ""
        self.context: int | None = None
        self.card: EngineCard | None = None
        self.uses: Counter[str] = Counter()
        self._loaded: set[str] = set()
        self._loading: dict[str, asyncio.Lock] = {}
        self._http = EngineClient(url, key)

    async def probe(self) -> None:
        """Check its health. An engine that is healthy again may be a new process, which holds no
        versions.
        """
        self._set_state(await self._trouble())

    async def _trouble(self) -> EngineTrouble | None:
        try:
            if not await self._answers():
                return "unhealthy"
            if not self.healthy:
                await self._learn()
        except EngineUnavailable as exc:
            return exc.trouble
        except (ValueError, LookupError, TypeError, AttributeError):
            return "unreadable"
        return None

    async def _learn(self) -> None:
        status, content = await self._http.fetch("GET", "/v1/models", None, _PROBE_SECONDS)
        if status in _KEY_REFUSED:
            raise _refuses_key()
        if status != 200:
            raise EngineUnavailable("an engine does not list its models", trouble="unreadable")
        cards = json.loads(content)["data"]
        names = {card["id"] for card in cards}
        base: dict[str, Any] = next((card for card in cards if not card.get("parent")), {})
        self.base_name = base["id"]
        self.card = read_card(base)
        self.context = base.get("max_model_len")
        self._loaded = {name for name in names if name.startswith(NAME_PREFIX)}

    def fail(self, trouble: EngineTrouble) -> None:
        """Take it out until a probe finds it well."""
        self._set_state(trouble)

    def company(self) -> int:
        """Number of this gateway's requests on the engine when the first of them failed; on a
        healthy engine, the current number.
        """
        self._company = self._company or self.in_flight
        return self._company

    def _set_state(self, trouble: EngineTrouble | None) -> None:
        if trouble is None:
            self._company = 0
        else:
            self.company()
        self.healthy = trouble is None
        self.state.set(trouble, self.base_name)

    def forget(self, name: str) -> None:
        """Note that it does not hold a version any longer."""
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
        """Load a version into the engine, if it is not loaded yet.

        Raises:
            AdapterInvalid: it refuses the version; the faults are its own words, without the path.
            EngineUnavailable: it does not answer.
        """
        if name in self._loaded:
            return
        try:
            async with self._loading.setdefault(name, asyncio.Lock()):
                if name not in self._loaded:
                    await self._timed_load(name, path)
                    self._loaded.add(name)
        finally:
            self._loading.pop(name, None)

    async def _timed_load(self, name: str, path: Path) -> None:
        begun = time.monotonic()
        result = "failed"
        try:
            await self._load(name, path)
            result = "loaded"
        finally:
            LOADS.labels(result).inc()
            LOAD_SECONDS.observe(time.monotonic() - begun)

    async def _load(self, name: str, path: Path) -> None:
        body = {"lora_name": name, "lora_path": str(path)}
        try:
            status, content = await self._http.fetch(
                "POST", "/v1/load_lora_adapter", body, _LOAD_SECONDS
            )
        except EngineUnavailable as exc:
            self.fail(exc.trouble)
            raise
        if status == 200:
            return
        if status in _KEY_REFUSED:
            self.fail("key_refused")
            raise _refuses_key()
        fault = EngineFault.in_answer(content)
        if fault.already_loaded:
            return
        if status == 400:
            raise AdapterInvalid(
                "", [each.replace(str(path), "it") for each in fault.faults or [fault.message]]
            )
        raise EngineFailed(f"an engine could not load the adapter (status {status})")

    async def unload(self, name: str) -> None:
        """Unload a version; an engine that does not respond has forgotten it."""
        self.forget(name)
        with contextlib.suppress(EngineUnavailable):
            await self._http.fetch(
                "POST", "/v1/unload_lora_adapter", {"lora_name": name}, _LOAD_SECONDS
            )

    async def usage(self, request_id: str) -> Tokens | None:
        """Usage of an ended request; None if the engine does not know it."""
        try:
            status, content = await self._http.fetch(
                "GET", f"/v1/reft/usage/{request_id}", None, _USAGE_SECONDS
            )
            return Tokens.of(json.loads(content)) if status == 200 else None
        # the last: the gateway has closed it
        except (EngineUnavailable, ValueError, AttributeError, RuntimeError):
            return None

    async def metrics(self) -> bytes:
        """Its Prometheus metrics.

        Raises:
            EngineUnavailable: it does not answer.
        """
        status, content = await self._http.fetch("GET", "/metrics", None, _PROBE_SECONDS)
        if status != 200:
            raise EngineUnavailable(f"an engine does not return its metrics (status {status})")
        return content

    async def open(self, path: str, body: bytes, headers: Mapping[str, str]) -> EngineResponse:
        """Send a request. It is retried once, on another connection to a healthy engine, if it
        raced with the closing of an idle connection. There are no duplicate answers: the engine
        aborts the work of closed connections.

        Raises:
            EngineUnavailable: it did not begin to answer, and is taken out until a probe finds it
                well.
        """
        begun = time.monotonic()
        try:
            return await self._begin(path, body, headers)
        except EngineUnavailable as exc:
            late = time.monotonic() - begun > _CLOSING_SECONDS
            if not exc.delivered or late or not await self._is_well():
                self.fail(exc.trouble)
                raise
        try:
            return await self._begin(path, body, headers)
        except EngineUnavailable as exc:
            self.fail(exc.trouble)
            raise EngineUnavailable(str(exc), delivered=True, trouble=exc.trouble) from exc

    async def _begin(self, path: str, body: bytes, headers: Mapping[str, str]) -> EngineResponse:
        response = await self._http.open(path, body, headers)
        if response.status in _KEY_REFUSED:  # about the gateway's key, not about the caller's
            response.close()
            raise _refuses_key()
        return response

    async def _answers(self) -> bool:
        status, _ = await self._http.fetch("GET", "/health", None, _PROBE_SECONDS)
        return status == 200

    async def _is_well(self) -> bool:
        with contextlib.suppress(EngineUnavailable):
            return await self._answers()
        return False

    async def close(self) -> None:
        """Close its connections, and take it out of the metrics."""
        self.state.remove()
        for gauge in (ENGINE_UP, ENGINE_IN_FLIGHT):
            with contextlib.suppress(KeyError):
                gauge.remove(self.name)
        await self._http.close()


def _refuses_key() -> EngineUnavailable:
    return EngineUnavailable(
        "an engine rejected the gateway's key; the operator has the details", trouble="key_refused"
    )
