"""One inference request, from its body to the end of the response.

`resolve -> spend -> admit -> begin -> relay -> settle`: whose model it is, what the caller may
still use, a note on disk that it begins, an engine that begins to respond, the bytes as they come,
and their usage.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request, Response

from reft_serve import errors, structured_outputs
from reft_serve.adapters.engine_fault import CHAT_TEMPLATE, EngineFault
from reft_serve.database.keys import Principal
from reft_serve.database.models import now_ms
from reft_serve.database.resolution import Target
from reft_serve.database.usage import Ending, Opening, Status
from reft_serve.gateway.accounting.demand import Demand, bounded, demand_of
from reft_serve.gateway.accounting.quotas import Reservation
from reft_serve.gateway.engines.client import EngineResponse
from reft_serve.gateway.engines.engine import Engine, engine_name
from reft_serve.gateway.engines.tokens import Tokens
from reft_serve.gateway.http.budget import Lease
from reft_serve.gateway.http.streaming import ClientGone, Streamed, while_there
from reft_serve.gateway.http.tracing import outgoing
from reft_serve.gateway.inference import reft_fields
from reft_serve.gateway.inference.departure import estimated, used_until_now
from reft_serve.gateway.inference.engine_ends import ended_with, note_end
from reft_serve.gateway.inference.rewriting import Rewriter, rewrite_whole, sse_error
from reft_serve.gateway.schemas.errors import error_body, status_of
from reft_serve.gateway.schemas.inference import InferenceBody
from reft_serve.gateway.services import Services
from reft_serve.observability import FIRST_BYTE_SECONDS, RETRIES, TOKENS, request_id

__all__ = ["Endpoint", "infer"]

_TRIES = 3
_GONE = 499
_COMMIT_SECONDS = 5.0
_UNCOUNTED = "the database does not respond, so the request could not be recorded"
_T = TypeVar("_T")
_Emit = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of the engine's routes."""

    name: str
    path: str
    limit_fields: tuple[str, ...] = ()
    # What is reserved if a request names no limit; `engine_default`: the engine generates no more
    # then.
    default_tokens: int = 0
    engine_default: bool = False
    typed_events: bool = False


@dataclass(slots=True)
class _InferenceRequest:
    """State of one inference request."""

    services: Services
    caller: Principal
    endpoint: Endpoint
    body: dict[str, Any]
    public_model: str
    target: Target | None
    opening: Opening
    stack: AsyncExitStack
    size: int
    # What is held of the process's memory until the answer has been sent.
    leases: list[Lease]
    begun: float = field(default_factory=time.monotonic)
    spending: Reservation = field(default_factory=lambda: Reservation(0))
    # The field in which we named the limit of its length, as the caller named none.
    added: str | None = None
    demand: Demand = field(default_factory=lambda: Demand(0, 0, 1))
    engine: Engine | None = None
    engine_model: str = ""
    # When it was given to the engine, by the monotonic clock.
    delivered: float = 0.0
    settled: bool = False
    # What the line of this request in the log says beside its path.
    facts: dict[str, Any] = field(default_factory=dict)

    async def run(self, size: int, function: Callable[..., _T], *args: Any) -> _T:
        """Call a function whose work grows with `size` bytes of this request."""
        return await self.services.intake.run(self.caller.tenant_id, size, function, *args)

    async def settle(self, status: Status, tokens: Tokens) -> bool:
        """Record usage, release the slots and return whether the record is committed: False while
        the database is down, when the ledger keeps retrying. Only the first call has an effect.
        """
        if self.settled:
            return True
        self.settled = True
        services = self.services
        committed = services.ledger.settle(self.ending(status, tokens))
        services.fleet.charge(self.caller.tenant_id, tokens.work)
        if status == "completed":
            services.quarantine.clear(self.caller.tenant_id, self.endpoint.path, self.body)
        await self.stack.aclose()
        await self._count(tokens)
        return await _on_disk(committed)

    async def leave(self, seen: Tokens) -> None:
        """Settle it after its caller has left: the engine's work is charged, in the queue at
        once.
        """
        if self.settled:
            return
        if not self.delivered or self.engine is None:
            await self.settle("cancelled", seen)
            return
        self.settled = True
        fleet = self.services.fleet
        tenant = self.caller.tenant_id
        # until it is known: the place that it returns goes to whoever is next
        fleet.correct(tenant, self.demand.total)
        tokens = estimated(self.demand, seen, time.monotonic() - self.delivered)
        try:
            await self.stack.aclose()
            if not seen.prompt:  # else the engine has said with each chunk what it counts
                tokens = await used_until_now(self.engine, self.opening.request_id) or tokens
        finally:
            fleet.correct(tenant, -self.demand.total)
            fleet.charge(tenant, tokens.work)
        committed = self.services.ledger.settle(self.ending("cancelled", tokens))
        await self._count(tokens)
        await _on_disk(committed)

    def ending(self, status: Status, tokens: Tokens) -> Ending:
        """The request's usage record."""
        return Ending(
            self.opening, status, tokens.prompt, tokens.cached, tokens.completion, now_ms()
        )

    async def _count(self, tokens: Tokens) -> None:
        services = self.services
        self.facts |= {"prompt_tokens": tokens.prompt, "completion_tokens": tokens.completion}
        tenant = services.names.label(self.caller.tenant)
        adapter = services.names.label(
            f"{self.caller.tenant}:{self.target.label}" if self.target else None
        )
        for kind in ("prompt", "cached", "completion"):
            TOKENS.labels(tenant, adapter, kind).inc(getattr(tokens, kind))
        if self.spending.tokens:  # they may be in Redis, and the caller may leave meanwhile
            await asyncio.shield(
                services.quotas.settle(self.spending, tokens.prompt + tokens.completion)
            )


async def _on_disk(committed: asyncio.Future[None]) -> bool:
    await asyncio.wait((committed,), timeout=_COMMIT_SECONDS)
    return committed.done()


async def infer(
    services: Services,
    request: Request,
    caller: Principal,
    endpoint: Endpoint,
    given: InferenceBody,
) -> Response:
    """Answer an inference request.

    Raises:
        ReftError: it did not begin to be answered; the class says why.
    """
    target = await services.lookup.target(caller, given.model)
    state = request.scope["state"]
    size = state["body_bytes"]
    body, added = await services.intake.run(
        caller.tenant_id, size, _checked, services, caller, endpoint, given
    )
    services.quarantine.check(caller.tenant_id, endpoint.path, body)
    if not services.ledger.healthy:  # else it would be computed, and refused then
        raise errors.DatabaseUnusable(_UNCOUNTED)
    opening = Opening(
        request_id.get() or "",
        services.settings.gateway_name,
        caller.tenant_id,
        caller.key_id,
        endpoint.name,
        given.model,
        target.version_id if target else None,
        now_ms(),
    )
    exchange = _InferenceRequest(
        services,
        caller,
        endpoint,
        body,
        given.model,
        target,
        opening,
        AsyncExitStack(),
        size,
        state["leases"],
    )
    exchange.added = added
    exchange.facts = state["facts"] = {"model": given.model}
    try:
        async with asyncio.timeout(services.settings.request_seconds), while_there(request.receive):
            return await _answer(exchange)
    except ClientGone:
        return Response(status_code=_GONE)
    except TimeoutError as exc:
        raise errors.Overloaded("the request timed out") from exc


async def _answer(exchange: _InferenceRequest) -> Response:
    services = exchange.services
    fields = exchange.endpoint.limit_fields
    default = exchange.endpoint.default_tokens
    demand = await exchange.run(exchange.size, demand_of, exchange.body, fields, default)
    exchange.demand = demand
    exchange.spending = await exchange.stack.enter_async_context(
        services.quotas.spend(exchange.caller, demand.total)
    )
    try:
        return await _begun(exchange)
    except BaseException as exc:
        await asyncio.shield(_give_up(exchange, exc))
        raise


async def _begun(exchange: _InferenceRequest) -> Response:
    services = exchange.services
    admitted: asyncio.Future[None] | None = None
    if exchange.body.get("stream"):
        admitted = services.ledger.admit(exchange.opening)
    else:
        services.ledger.note(exchange.opening)
    upstream = await _begin(exchange)
    if admitted is not None and not await _on_disk(admitted):
        raise errors.DatabaseUnusable(_UNCOUNTED)
    FIRST_BYTE_SECONDS.labels(exchange.endpoint.name).observe(time.monotonic() - exchange.begun)
    try:
        if upstream.status != 200:
            raise _refusal(exchange, upstream.status, await _whole(exchange, upstream))
        if upstream.is_stream:
            return await _stream(exchange, upstream)
        whole = await _whole(exchange, upstream)
        content, tokens = await exchange.run(
            len(whole), rewrite_whole, whole, exchange.engine_model, exchange.public_model
        )
    except errors.EngineFailed as exc:
        assert exchange.engine is not None
        if await _has_ended(exchange, exchange.engine.company()):
            raise errors.EngineEnded(str(exc)) from exc
        raise
    if not await exchange.settle("completed", tokens):
        services.ledger.retract(exchange.ending("failed", Tokens()))
        raise errors.DatabaseUnusable(_UNCOUNTED)
    return Response(content, 200, _headers(exchange), "application/json")


async def _whole(exchange: _InferenceRequest, upstream: EngineResponse) -> bytes:
    """All bytes of an answer, counted in the process's memory until they have been sent."""
    intake = exchange.services.intake
    length = upstream.length
    counted = intake.SMALL if length is None else length
    lease = await intake.memory_for(counted).take(exchange.caller.tenant_id, counted, lambda: False)
    exchange.leases.append(lease)
    if length is not None:
        return await upstream.read()
    parts: list[bytes] = []
    taken = 0
    while part := await upstream.chunk():
        parts.append(part)
        taken += len(part)
        if taken > lease.amount:
            lease.grow(len(part))
    return b"".join(parts)


async def _has_ended(exchange: _InferenceRequest, company: int) -> bool:
    assert exchange.engine is not None
    return await ended_with(
        exchange.services,
        exchange.opening,
        exchange.endpoint.path,
        exchange.body,
        exchange.engine,
        company,
    )


async def _give_up(exchange: _InferenceRequest, exc: BaseException) -> None:
    if isinstance(exc, asyncio.CancelledError):
        await exchange.leave(Tokens())
    # waiting for the disk would only hold the places
    elif isinstance(exc, errors.DatabaseUnusable):
        exchange.services.background.spawn(_failed(exchange))
    else:
        await _failed(exchange)


async def _failed(exchange: _InferenceRequest) -> None:
    await exchange.settle("failed", Tokens())


async def _begin(exchange: _InferenceRequest) -> EngineResponse:
    """An engine that has begun to answer. Engines that fail before that are left out, and others
    are asked.
    """
    services = exchange.services
    target = exchange.target
    tenant = exchange.caller.tenant_id
    affinity = target.digest if target else tenant
    failed: frozenset[Engine] = frozenset()
    for left in reversed(range(_TRIES)):
        attempt = AsyncExitStack()
        try:
            place = services.fleet.engine(tenant, affinity, failed)
            engine = await attempt.enter_async_context(place)
            exchange.engine = engine
            upstream = await _open(exchange, engine, attempt)
            # it was started again, or was told to forget it
            if upstream.status == 404 and target is not None and left:
                engine.forget(exchange.engine_model)
                await attempt.aclose()
                continue
            exchange.stack.push_async_callback(attempt.aclose)
            return upstream
        except errors.EngineUnavailable as exc:
            exchange.delivered = 0.0
            await attempt.aclose()
            services.background.spawn(services.fleet.probe())
            if exc.delivered:
                await _suspect(exchange)
            if not left or exchange.engine is None or exchange.engine in failed:
                raise
            failed |= {exchange.engine}
            RETRIES.inc()
        except BaseException:
            await attempt.aclose()
            raise
    raise errors.EngineUnavailable("no engine could serve the request; try again")


async def _suspect(exchange: _InferenceRequest) -> None:
    """Return if the request may be delivered once more, when it is its turn."""
    services = exchange.services
    path = exchange.endpoint.path
    body = exchange.body
    engine = exchange.engine
    assert engine is not None
    note_end(services, exchange.opening, path, body, engine, len(_engine_body(exchange)))
    await exchange.stack.enter_async_context(services.quarantine.turn(exchange.caller.tenant_id))


async def _open(
    exchange: _InferenceRequest, engine: Engine, attempt: AsyncExitStack
) -> EngineResponse:
    target = exchange.target
    name = engine_name(target.digest) if target else None
    attempt.enter_context(engine.using(name))
    if target is not None and name is not None:
        await _load(exchange, engine, name, exchange.services.store.path(target.digest))
    exchange.engine_model = name or engine.base_name
    headers = {"x-request-id": exchange.opening.request_id, **outgoing()}
    body = await exchange.run(exchange.size, _engine_body, exchange)
    exchange.delivered = time.monotonic()
    upstream = await engine.open(exchange.endpoint.path, body, headers)
    attempt.callback(upstream.close)
    return upstream


async def _load(exchange: _InferenceRequest, engine: Engine, name: str, path: Path) -> None:
    quarantine = exchange.services.quarantine
    tenant = exchange.caller.tenant_id
    quarantine.check_digest(tenant, name)
    try:
        await engine.load(name, path)
    except errors.EngineUnavailable as exc:
        if exc.delivered:  # whatever is asked of the adapter would end the next engine
            quarantine.suspect(tenant, name, alone=engine.company() <= 1)
        raise
    except (errors.EngineFailed, errors.AdapterInvalid):
        if path.is_dir():
            raise
        raise errors.ModelNotFound(
            f"The model {exchange.public_model[:200]!r} was deleted while the request was waiting."
        ) from None


def _engine_body(exchange: _InferenceRequest) -> bytes:
    body = exchange.body | {
        "model": exchange.engine_model,
        "cache_salt": exchange.caller.cache_salt,
    }
    body.pop("metadata", None)
    reft_fields.move_to_engine(body, exchange.target)
    context = exchange.engine.context if exchange.engine is not None else None
    # an engine refuses a number beyond its context
    if exchange.added is not None and context is not None:
        body[exchange.added] = min(body[exchange.added], context)
    if exchange.endpoint.typed_events:
        body["store"] = False
        # The engine takes this one from no header.
        body["request_id"] = exchange.opening.request_id.replace("req_", "resp_", 1)
    elif body.get("stream"):
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return json.dumps(body, separators=(",", ":")).encode()


async def _stream(exchange: _InferenceRequest, upstream: EngineResponse) -> Response:
    """The answer, once its first event is there: what fails before that is an ordinary error."""
    wants_usage = bool((exchange.body.get("stream_options") or {}).get("include_usage"))
    rewriter = Rewriter(exchange.engine_model, exchange.public_model, wants_usage)
    first = b""
    while not first and not rewriter.complete and rewriter.error is None:
        chunk = await upstream.chunk()
        if not chunk:
            raise errors.EngineFailed("the engine closed the connection before it sent a response")
        first = rewriter.feed(chunk)
    if not first and rewriter.error is not None:
        raise _refusal(
            exchange, int(rewriter.error.get("code") or 500), json.dumps(rewriter.error).encode()
        )

    async def relay(emit: _Emit) -> None:
        await _relay(exchange, upstream, rewriter, first, emit)

    async def finish() -> None:
        await exchange.leave(rewriter.tokens)

    return Streamed(relay, _headers(exchange), finish)


async def _relay(
    exchange: _InferenceRequest,
    upstream: EngineResponse,
    rewriter: Rewriter,
    first: bytes,
    emit: _Emit,
) -> None:
    failure: errors.ReftError | None = None
    try:
        async with asyncio.timeout(
            exchange.services.settings.request_seconds - (time.monotonic() - exchange.begun)
        ):
            if first:
                await emit(first)
            while chunk := await upstream.chunk():
                if rewritten := rewriter.feed(chunk):
                    await emit(rewritten)
    except TimeoutError:
        failure = errors.Overloaded("the request timed out")
    except errors.EngineFailed as exc:
        failure = exc
    if failure is None and rewriter.error is not None:
        failure = _refusal(exchange, 500, json.dumps(rewriter.error).encode())
    if failure is None and not rewriter.complete:
        failure = errors.EngineFailed("the engine stopped in the middle of its response")
    if isinstance(failure, errors.EngineFailed) and exchange.engine is not None:
        exchange.services.background.spawn(_look_at_end(exchange, exchange.engine.company()))
    # On disk before the last event: whoever has seen a whole answer finds it in the ledger.
    tokens = rewriter.tokens
    if failure is not None and tokens.completion:
        tokens = estimated(exchange.demand, tokens, 0)
    await exchange.settle("completed" if failure is None else "failed", tokens)
    if failure is None:
        await emit(rewriter.ending)
    else:
        code = status_of(failure)
        await emit(
            sse_error(
                error_body(code, str(failure), None, failure.code), exchange.endpoint.typed_events
            )
        )


async def _look_at_end(exchange: _InferenceRequest, company: int) -> None:
    await _has_ended(exchange, company)


def _headers(exchange: _InferenceRequest) -> dict[str, str]:
    version = {"x-reft-version": exchange.target.label} if exchange.target else {}
    return {
        **exchange.spending.headers,
        **version,
        **reft_fields.warnings(exchange.body, exchange.target),
    }


def _refusal(exchange: _InferenceRequest, status: int, content: bytes) -> errors.ReftError:
    """An engine's error in our words: none of its names, no path."""
    fault = EngineFault.in_answer(content)
    message = fault.message.replace(exchange.engine_model, exchange.public_model)
    if exchange.target is not None:
        message = message.replace(
            str(exchange.services.store.path(exchange.target.digest)), exchange.public_model
        )
    if status == 404:
        return errors.RequestInvalid("the engine does not serve this endpoint for this model", None)
    if fault.param == CHAT_TEMPLATE:
        return errors.RequestInvalid(
            "the base model has no chat template, so it cannot process messages: use "
            "/v1/completions, or ask the operator to start its engine with --chat-template FILE",
            "messages",
        )
    if 400 <= status < 500:
        return errors.RequestInvalid(message[:2000], fault.param)
    if status == 503:
        return errors.Overloaded("the engine cannot accept the request now; try again")
    return errors.EngineFailed("the engine failed to process this request")


def _checked(
    services: Services, caller: Principal, endpoint: Endpoint, given: InferenceBody
) -> tuple[dict[str, Any], str | None]:
    """The body for an engine, and the name of the length field that was added, if any."""
    asked = given.model_dump(exclude_unset=True, exclude_none=True)
    structured_outputs.check_request(asked)
    default = endpoint.default_tokens if endpoint.engine_default else None
    body = bounded(services.quotas.limits(caller), asked, endpoint.limit_fields, default)
    reft_fields.check(body, services.settings.max_strength, services.settings.template_arguments)
    return body, next(iter(body.keys() - asked.keys()), None)
