"""Prometheus metrics of the gateway, and of engines with private sockets."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from reft_serve.gateway.routes.bounded_route import BoundedRoute
from reft_serve.gateway.routes.deps import ServicesDep, requires

__all__ = ["EngineName", "router"]

_PAGE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}
EngineName = Annotated[str, Path(pattern=r"^engine-[0-9]{1,4}$")]

router = APIRouter(
    tags=["metrics"], dependencies=[Depends(requires("metrics", "admin"))], route_class=BoundedRoute
)


@router.get("/metrics", response_class=Response, responses=_PAGE)
async def metrics() -> Response:
    """Prometheus metrics of the gateway. They name tenants, so a key of scope `metrics` or `admin`
    is required.
    """
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/admin/engines/{engine}/metrics", response_class=Response, responses=_PAGE)
async def engine_metrics(engine: EngineName, services: ServicesDep) -> Response:
    """Prometheus metrics of an engine, for engines with a private socket. Requires scope `metrics`
    or `admin`.
    """
    return Response(await services.fleet.named(engine).metrics(), media_type=CONTENT_TYPE_LATEST)
