"""Delivery of an inference request to an engine. Engines that fail before they respond are
left out, and others are asked.
"""

from __future__ import annotations

import json
import time
from contextlib import AsyncExitStack
from pathlib import Path

from reft_serve import errors
from reft_serve.gateway.engines.client import EngineResponse
from reft_serve.gateway.engines.engine import Engine, engine_name
from reft_serve.gateway.http.tracing import outgoing
from reft_serve.gateway.inference import reft_fields
from reft_serve.gateway.inference.engine_ends import note_end
from reft_serve.gateway.inference.request import InferenceRequest
from reft_serve.observability import RETRIES

__all__ = ["deliver"]

_TRIES = 3


async def deliver(exchange: InferenceRequest) -> EngineResponse:
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


async def _suspect(exchange: InferenceRequest) -> None:
    """Return if the request may be delivered once more, when it is its turn."""
    services = exchange.services
    path = exchange.endpoint.path
    body = exchange.body
    engine = exchange.engine
    assert engine is not None
    note_end(services, exchange.opening, path, body, engine, len(_engine_body(exchange)))
    await exchange.stack.enter_async_context(services.quarantine.turn(exchange.caller.tenant_id))


async def _open(
    exchange: InferenceRequest, engine: Engine, attempt: AsyncExitStack
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


async def _load(exchange: InferenceRequest, engine: Engine, name: str, path: Path) -> None:
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


def _engine_body(exchange: InferenceRequest) -> bytes:
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
