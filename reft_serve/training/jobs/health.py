"""Liveness, readiness and metrics of a worker, over HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from reft_serve.training.jobs.worker import Worker

__all__ = ["server"]


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them to the worker, which ends in its own order."""
        yield


def server(worker: Worker, host: str, port: int) -> uvicorn.Server:
    """`/health/live`, `/health/ready` and `/metrics`, as a uvicorn server; set its `should_exit` to
    stop it.
    """

    async def live(_: Request) -> Response:
        return JSONResponse(
            {"status": "live" if worker.alive else "stuck"}, 200 if worker.alive else 503
        )

    async def ready(_: Request) -> Response:
        why = worker.unready
        return JSONResponse(
            {"status": "ready"} if why is None else {"status": "not ready", "why": why},
            503 if why else 200,
        )

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    routes = [
        Route("/health/live", live),
        Route("/health/ready", ready),
        Route("/metrics", metrics),
    ]
    config = uvicorn.Config(
        Starlette(routes=routes), host, port, log_config=None, access_log=False, server_header=False
    )
    return _Server(config)
