"""Dispatch of requests to engines: affinity bounded by load, health, drain, and a queue that is
fair to tenants.

Requests of one version go to one engine as long as that engine is not much busier than the others
(rendezvous hashing with bounded load, Mirrokni et al. 2016), so that its slots and its prefix cache
are used well. If nothing is free, tenants take turns by the work they have had (virtual token
counter, Sheng et al. 2024), not by how often they ask. No tenant gets all slots of an engine, so
that a tenant with few requests need not wait for another's responses.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from reft_serve.errors import (
    AdapterInvalid,
    EngineTrouble,
    EngineUnavailable,
    NotFound,
    Overloaded,
    ServiceError,
)
from reft_serve.gateway.engines.discovery import Discovery
from reft_serve.gateway.engines.engine import Engine
from reft_serve.observability import QUEUE_SECONDS, QUEUED

__all__ = ["Fleet"]

_log = logging.getLogger(__name__)
_SLACK = 1.25
# One place in so many is kept from a tenant that has the others. Engines of fewer places have none
# to spare.
_RESERVED_FRACTION = 8
# How much the last request of a tenant changes what its next one is expected to take.
_EWMA_WEIGHT = 0.2
_UNLOAD_POLL_SECONDS = 0.1
# An engine that is down is looked at this often: nobody waits for it, and everybody for its return.
_UNWELL_PROBE_SECONDS = 0.25
# An engine that has been down for this many probes is probed at the longer interval.
_FREQUENT_PROBES = 20
_LONG_UNWELL_PROBE_SECONDS = 1.5


@dataclass(eq=False, slots=True)
class _Waiter:
    tenant: str
    affinity: str
    excluded: frozenset[Engine]
    expected: float = 0.0
    turn: asyncio.Future[Engine] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Fleet:
    """The engines of this gateway and the requests that wait for one."""

    def __init__(
        self, members: Discovery, capacity: int, queue_seconds: float, probe_seconds: float
    ) -> None:
        self._members = members
        self._capacity = capacity
        self._queue_seconds = queue_seconds
        self._probe_seconds = probe_seconds
        self._most = capacity - capacity // _RESERVED_FRACTION
        self._reserved: Counter[Engine] = Counter()
        self._held: Counter[tuple[Engine, str]] = Counter()
        self._queues: dict[str, deque[_Waiter]] = {}
        self._virtual_time: defaultdict[str, float] = defaultdict(float)
        self._mean_tokens: defaultdict[str, float] = defaultdict(lambda: 1.0)
        self._active: defaultdict[str, int] = defaultdict(int)
        self._probing: asyncio.Task[None] | None = None
        self._differ = False

    async def start(self) -> None:
        """Look at every engine once, and from then on again and again."""
        await self.probe()
        if not self.engines:
            _log.warning("no engine found; retrying until there is one")
        self._probing = asyncio.create_task(self._probe_forever())

    async def close(self) -> None:
        """Stop looking and close the connections."""
        if self._probing is not None:
            self._probing.cancel()
            with suppress(asyncio.CancelledError):
                await self._probing
        await self._members.close()

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engines that there are now."""
        return self._members.engines

    def named(self, name: str) -> Engine:
        """The engine of this name.

        Raises:
            NotFound: there is none now.
        """
        named = next((engine for engine in self.engines if engine.name == name), None)
        if named is None:
            raise NotFound(f"there is no engine {name!r}")
        return named

    async def probe(self) -> None:
        """Look now which engines there are, and how each is."""
        await self._members.refresh()
        await asyncio.gather(*(engine.probe() for engine in self.engines))
        await self._members.prune()
        self._compare()
        self._dispatch()

    def _compare(self) -> None:
        """Warn once if engines serve different base models: an adapter fits one of them only."""
        bases = {
            engine.name: engine.card.base
            for engine in self.engines
            if engine.healthy and engine.card is not None
        }
        differ = len(set(bases.values())) > 1
        if differ and not self._differ:
            models = {name: base.model_dump(mode="json") for name, base in bases.items()}
            _log.warning(
                "engines serve different base models", extra={"data": {"base_models": models}}
            )
        self._differ = differ

    async def _probe_forever(self) -> None:
        unchanged = 0
        before = self._troubles()
        while True:
            pause = self._probe_seconds
            if not self.engines or any(before.values()):
                frequent = unchanged < _FREQUENT_PROBES
                pause = min(
                    pause, _UNWELL_PROBE_SECONDS if frequent else _LONG_UNWELL_PROBE_SECONDS
                )
            await asyncio.sleep(pause)
            try:
                await self.probe()
            except Exception:
                _log.exception("probing the engines failed; retrying")
            now = self._troubles()
            unchanged = unchanged + 1 if now == before else 0
            before = now

    def _troubles(self) -> dict[Engine, EngineTrouble | None]:
        return {engine: engine.state.trouble for engine in self.engines}

    @property
    def ready(self) -> bool:
        """True if a request would find an engine."""
        return any(self._is_open(engine) for engine in self.engines)

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return sum(len(queue) for queue in self._queues.values())

    def charge(self, tenant: str, tokens: float) -> None:
        """Note the work that a request of a tenant has been."""
        self._virtual_time[tenant] += tokens
        self._mean_tokens[tenant] += _EWMA_WEIGHT * (tokens - self._mean_tokens[tenant])

    def correct(self, tenant: str, tokens: float) -> None:
        """Change what was charged for a request when it turns out to have been more, or less."""
        self._virtual_time[tenant] += tokens

    @asynccontextmanager
    async def engine(
        self, tenant: str, affinity: str, excluded: frozenset[Engine]
    ) -> AsyncIterator[Engine]:
        """Hold a place in an engine, as soon as one is free.

        Args:
            tenant: whose turn it takes.
            affinity: requests with the same go to the same engine if they can.
            excluded: engines that have failed this request.

        Raises:
            EngineUnavailable: no engine is up.
            Overloaded: none became free in time.
        """
        begun = time.monotonic()
        self._enter(tenant)
        try:
            waiter = _Waiter(tenant, affinity, excluded)
            engine = await self._place(waiter)
            QUEUE_SECONDS.observe(time.monotonic() - begun)
            try:
                yield engine
            finally:
                self._release(engine, waiter)
                self._dispatch()
        finally:
            self._active[tenant] -= 1
            if not self._active[tenant]:
                del self._active[tenant]

    def _enter(self, tenant: str) -> None:
        """A tenant that comes back has saved up no turns while it was away."""
        if not self._active[tenant] and len(self._active) > 1:
            least = min(self._virtual_time[other] for other, count in self._active.items() if count)
            self._virtual_time[tenant] = max(self._virtual_time[tenant], least)
        self._active[tenant] += 1

    async def _place(self, waiter: _Waiter) -> Engine:
        if not any(
            self._is_open(engine) for engine in self.engines if engine not in waiter.excluded
        ):
            raise EngineUnavailable("no engine is up; try again")
        self._queues.setdefault(waiter.tenant, deque()).append(waiter)
        self._dispatch()
        if waiter.turn.done():
            return waiter.turn.result()
        QUEUED.set(self.waiting)
        try:
            async with asyncio.timeout(self._queue_seconds):
                return await self._turn(waiter)
        except TimeoutError as exc:
            raise Overloaded("every engine was busy; try again", self._queue_seconds / 4) from exc
        finally:
            self._leave(waiter)

    async def _turn(self, waiter: _Waiter) -> Engine:
        # Not `wait_for`, which before Python 3.12 returns the result to a caller that has left as
        # its turn came.
        try:
            return await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.done() and not waiter.turn.cancelled():
                self._release(waiter.turn.result(), waiter)
                self._dispatch()
            raise

    def _leave(self, waiter: _Waiter) -> None:
        queue = self._queues.get(waiter.tenant)
        if queue is not None:
            with suppress(ValueError):
                queue.remove(waiter)
            if not queue:
                del self._queues[waiter.tenant]
        QUEUED.set(self.waiting)

    def _dispatch(self) -> None:
        """Give free places to waiting requests: first to the tenant that has had least."""
        while self._queues:
            for tenant in sorted(self._queues, key=lambda tenant: self._virtual_time[tenant]):
                waiter = self._queues[tenant][0]
                engine = self._pick(waiter)
                if engine is not None:
                    break
            else:
                return
            self._reserved[engine] += 1
            self._held[engine, tenant] += 1
            # Until its tokens are known. Else a tenant that is behind would get every place for as
            # long as answers take.
            waiter.expected = self._mean_tokens[tenant]
            self._virtual_time[tenant] += waiter.expected
            self._queues[tenant].popleft()
            if not self._queues[tenant]:
                del self._queues[tenant]
            if not waiter.turn.done():
                waiter.turn.set_result(engine)
            else:
                self._release(engine, waiter)

    def _release(self, engine: Engine, waiter: _Waiter) -> None:
        tenant = waiter.tenant
        self._virtual_time[tenant] -= waiter.expected
        self._reserved[engine] -= 1
        self._held[engine, tenant] -= 1
        # Nothing stays of engines and tenants that go.
        if not self._reserved[engine]:
            del self._reserved[engine]
        if not self._held[engine, tenant]:
            del self._held[engine, tenant]

    def _is_open(self, engine: Engine) -> bool:
        return engine.healthy and not engine.draining

    def _pick(self, waiter: _Waiter) -> Engine | None:
        """The first engine by rendezvous that is not overloaded, or None where all are full, or
        full of this tenant's.
        """
        able = [
            engine
            for engine in self.engines
            if self._is_open(engine) and engine not in waiter.excluded
        ]
        free = [
            engine
            for engine in able
            if self._reserved[engine] < self._capacity
            and self._held[engine, waiter.tenant] < self._most
        ]
        if not free:
            return None
        if len(free) == 1:
            return free[0]
        bound = math.ceil(_SLACK * (sum(self._reserved[engine] for engine in able) + 1) / len(able))
        ranked = sorted(free, key=lambda engine: _score(waiter.affinity, engine.url), reverse=True)
        within = (engine for engine in ranked if self._reserved[engine] < bound)
        return next(within, min(ranked, key=lambda engine: self._reserved[engine]))

    async def load(self, name: str, path: Path) -> None:
        """Load a version into every healthy engine, one first, so that a harmful version cannot
        crash them all.

        Raises:
            AdapterInvalid: an engine refuses it; none holds it then.
            EngineUnavailable: no engine is up to check it, or the first one ended with it.
        """
        up = [engine for engine in self.engines if engine.healthy]
        failure: Exception = EngineUnavailable("no engine is up to check the adapter; try again")
        while up:
            first = up.pop(0)
            try:
                await first.load(name, path)
                break
            except AdapterInvalid:
                raise
            except ServiceError as exc:
                if isinstance(exc, EngineUnavailable) and exc.delivered:
                    raise
                failure = exc
        else:
            raise failure
        results = await asyncio.gather(
            *(engine.load(name, path) for engine in up), return_exceptions=True
        )
        refused = next((result for result in results if isinstance(result, AdapterInvalid)), None)
        if refused is not None:
            await asyncio.gather(*(engine.unload(name) for engine in (first, *up)))
            raise refused

    async def unload(self, name: str, patience: float) -> None:
        """Unload a version from every engine once no request of this gateway uses it, or after
        `patience` seconds.
        """
        deadline = time.monotonic() + patience
        while any(engine.uses[name] for engine in self.engines) and time.monotonic() < deadline:
            await asyncio.sleep(_UNLOAD_POLL_SECONDS)
        await asyncio.gather(*(engine.unload(name) for engine in self.engines))


def _score(affinity: str, url: str) -> bytes:
    return hashlib.blake2b(f"{affinity}\0{url}".encode(), digest_size=8).digest()
