"""Liveness and readiness probes."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from reft_serve.errors import DatabaseUnusable, EngineUnavailable, Overloaded
from reft_serve.gateway.routes.deps import ServicesDep
from reft_serve.gateway.schemas.errors import ErrorAnswer

__all__ = ["router"]

router = APIRouter(tags=["health"])
_PING_SECONDS = 3.0


class Health(BaseModel):
    """A successful probe."""

    status: Literal["ok"] = "ok"


@router.get("/health/live", openapi_extra={"security": []})
async def live() -> Health:
    """Liveness: 200 while the process responds."""
    return Health()


@router.get(
    "/health/ready", responses={503: {"model": ErrorAnswer}}, openapi_extra={"security": []}
)
async def ready(services: ServicesDep) -> Health:
    """Readiness: 200 if an engine is up and the database and stores are writable; else 503, also
    while draining.
    """
    if services.draining:
        raise Overloaded("the gateway is shutting down")
    try:
        async with asyncio.timeout(_PING_SECONDS):
            await services.database.ping()
    except TimeoutError as exc:
        raise DatabaseUnusable("the database did not respond in time") from exc
    services.write_probe.check()
    if not services.ledger.healthy:
        raise DatabaseUnusable("the database cannot be written")
    if not services.fleet.ready:
        raise EngineUnavailable("no engine is up")
    return Health()
