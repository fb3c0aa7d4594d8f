"""Responses of engines on their way to the caller: whole, streamed, or as an error in the gateway's
words.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

from fastapi import Response

from reft_serve import errors
from reft_serve.adapters.engine_fault import CHAT_TEMPLATE, EngineFault
from reft_serve.gateway.engines.client import EngineResponse
from reft_serve.gateway.http.streaming import Streamed
from reft_serve.gateway.inference import reft_fields
from reft_serve.gateway.inference.departure import estimated
from reft_serve.gateway.inference.engine_ends import ended_with
from reft_serve.gateway.inference.request import InferenceRequest
from reft_serve.gateway.inference.rewriting import Rewriter, sse_error
from reft_serve.gateway.schemas.errors import error_body, status_of

__all__ = ["has_ended", "headers", "read_whole", "refusal", "stream"]

Emit = Callable[[bytes], Awaitable[None]]


async def read_whole(exchange: InferenceRequest, upstream: EngineResponse) -> bytes:
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


async def has_ended(exchange: InferenceRequest, company: int) -> bool:
    assert exchange.engine is not None
    return await ended_with(
        exchange.services,
        exchange.opening,
        exchange.endpoint.path,
        exchange.body,
        exchange.engine,
        company,
    )


async def stream(exchange: InferenceRequest, upstream: EngineResponse) -> Response:
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
        raise refusal(
            exchange, int(rewriter.error.get("code") or 500), json.dumps(rewriter.error).encode()
        )

    async def relay(emit: Emit) -> None:
        await _relay(exchange, upstream, rewriter, first, emit)

    async def finish() -> None:
        await exchange.leave(rewriter.tokens)

    return Streamed(relay, headers(exchange), finish)


async def _relay(
    exchange: InferenceRequest,
    upstream: EngineResponse,
    rewriter: Rewriter,
    first: bytes,
    emit: Emit,
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
        failure = refusal(exchange, 500, json.dumps(rewriter.error).encode())
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


async def _look_at_end(exchange: InferenceRequest, company: int) -> None:
    await has_ended(exchange, company)


def headers(exchange: InferenceRequest) -> dict[str, str]:
    version = {"x-reft-version": exchange.target.label} if exchange.target else {}
    return {
        **exchange.spending.headers,
        **version,
        **reft_fields.warnings(exchange.body, exchange.target),
    }


def refusal(exchange: InferenceRequest, status: int, content: bytes) -> errors.ReftError:
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
