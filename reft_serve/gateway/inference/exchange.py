"""One inference request, from its body to the end of the response.

`resolve -> spend -> admit -> deliver -> relay -> settle`: whose model it is, what the caller may
still use, a note on disk that it begins, an engine that begins to respond, the bytes as they come,
and their usage.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any

from fastapi import Request, Response

from reft_serve import errors, structured_outputs
from reft_serve.database.keys import Principal
from reft_serve.database.models import now_ms
from reft_serve.database.usage import Opening
from reft_serve.gateway.accounting.demand import bounded, demand_of
from reft_serve.gateway.engines.tokens import Tokens
from reft_serve.gateway.http.streaming import ClientGone, while_there
from reft_serve.gateway.inference import reft_fields
from reft_serve.gateway.inference.delivery import deliver
from reft_serve.gateway.inference.request import Endpoint, InferenceRequest, on_disk
from reft_serve.gateway.inference.responses import has_ended, headers, read_whole, refusal, stream
from reft_serve.gateway.inference.rewriting import rewrite_whole
from reft_serve.gateway.schemas.inference import InferenceBody
from reft_serve.gateway.services import Services
from reft_serve.observability import FIRST_BYTE_SECONDS, request_id

__all__ = ["infer"]

_GONE = 499
_UNCOUNTED = "the database does not respond, so the request could not be recorded"


async def infer(
    services: Services,
    request: Request,
    caller: Principal,
    endpoint: Endpoint,
    parsed: InferenceBody,
) -> Response:
    """Answer an inference request.

    Raises:
        ReftError: it did not begin to be answered; the class says why.
    """
    target = await services.lookup.target(caller, parsed.model)
    state = request.scope["state"]
    size = state["body_bytes"]
    body, added = await services.intake.run(
        caller.tenant_id, size, _checked, services, caller, endpoint, parsed
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
        parsed.model,
        target.version_id if target else None,
        now_ms(),
    )
    exchange = InferenceRequest(
        services,
        caller,
        endpoint,
        body,
        parsed.model,
        target,
        opening,
        AsyncExitStack(),
        size,
        state["leases"],
    )
    exchange.added = added
    exchange.facts = state["facts"] = {"model": parsed.model}
    try:
        async with asyncio.timeout(services.settings.request_seconds), while_there(request.receive):
            return await _answer(exchange)
    except ClientGone:
        return Response(status_code=_GONE)
    except TimeoutError as exc:
        raise errors.Overloaded("the request timed out") from exc


async def _answer(exchange: InferenceRequest) -> Response:
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


async def _begun(exchange: InferenceRequest) -> Response:
    services = exchange.services
    admitted: asyncio.Future[None] | None = None
    if exchange.body.get("stream"):
        admitted = services.ledger.admit(exchange.opening)
    else:
        services.ledger.note(exchange.opening)
    upstream = await deliver(exchange)
    if admitted is not None and not await on_disk(admitted):
        raise errors.DatabaseUnusable(_UNCOUNTED)
    FIRST_BYTE_SECONDS.labels(exchange.endpoint.name).observe(time.monotonic() - exchange.begun)
    try:
        if upstream.status != 200:
            raise refusal(exchange, upstream.status, await read_whole(exchange, upstream))
        if upstream.is_stream:
            return await stream(exchange, upstream)
        whole = await read_whole(exchange, upstream)
        content, tokens = await exchange.run(
            len(whole), rewrite_whole, whole, exchange.engine_model, exchange.public_model
        )
    except errors.EngineFailed as exc:
        assert exchange.engine is not None
        if await has_ended(exchange, exchange.engine.company()):
            raise errors.EngineEnded(str(exc)) from exc
        raise
    if not await exchange.settle("completed", tokens):
        services.ledger.retract(exchange.ending("failed", Tokens()))
        raise errors.DatabaseUnusable(_UNCOUNTED)
    return Response(content, 200, headers(exchange), "application/json")


async def _give_up(exchange: InferenceRequest, exc: BaseException) -> None:
    if isinstance(exc, asyncio.CancelledError):
        await exchange.leave(Tokens())
    # waiting for the disk would only hold the places
    elif isinstance(exc, errors.DatabaseUnusable):
        exchange.services.background.spawn(_failed(exchange))
    else:
        await _failed(exchange)


async def _failed(exchange: InferenceRequest) -> None:
    await exchange.settle("failed", Tokens())


def _checked(
    services: Services, caller: Principal, endpoint: Endpoint, parsed: InferenceBody
) -> tuple[dict[str, Any], str | None]:
    """The body for an engine, and the name of the length field that was added, if any."""
    asked = parsed.model_dump(exclude_unset=True, exclude_none=True)
    structured_outputs.check_request(asked)
    default = endpoint.default_tokens if endpoint.engine_default else None
    body = bounded(services.quotas.limits(caller), asked, endpoint.limit_fields, default)
    reft_fields.check(body, services.settings.max_strength, services.settings.template_arguments)
    return body, next(iter(body.keys() - asked.keys()), None)
