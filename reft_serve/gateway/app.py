"""The gateway as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from reft_serve import __version__
from reft_serve.adapters.store import AdapterStore
from reft_serve.config import GatewaySettings
from reft_serve.database import usage
from reft_serve.database.connection import Database
from reft_serve.database.migrations.schema import check_schema, migrate
from reft_serve.database.models import now_ms
from reft_serve.errors import DatabaseUnusable, ReftError, StoreUnusable
from reft_serve.gateway import maintenance
from reft_serve.gateway.accounting.ledger import Ledger
from reft_serve.gateway.accounting.quotas import Quotas
from reft_serve.gateway.engines.discovery import Discovery
from reft_serve.gateway.engines.fleet import Fleet
from reft_serve.gateway.events.job_events import Followers
from reft_serve.gateway.events.webhook_sender import WebhookSender
from reft_serve.gateway.http.cors import Cors
from reft_serve.gateway.http.intake import Intake
from reft_serve.gateway.http.tracing import configure_tracing
from reft_serve.gateway.lookup import LookupCache
from reft_serve.gateway.middleware import RequestMiddleware
from reft_serve.gateway.routes import (
    adapters,
    admin,
    files,
    fine_tuning,
    health,
    inference,
    keys,
    metrics,
    models,
    permissions,
    webhooks,
)
from reft_serve.gateway.routes import usage as usage_routes
from reft_serve.gateway.schemas import errors
from reft_serve.gateway.services import Services
from reft_serve.gateway.write_probe import WriteProbe
from reft_serve.observability import BoundedNames
from reft_serve.storage.blobs import BlobStore

__all__ = ["create_app"]

_log = logging.getLogger(__name__)
_RECOVERY_SECONDS = 60.0
# The names that these schemas have had in the OpenAPI document, and so in generated clients.
_SCHEMA_NAMES = {
    "ErrorObject": "reft_serve__gateway__answers___Error",
    "JobError": "reft_serve__gateway__job_schemas___Error",
}
_ROUTES = (
    health,
    metrics,
    inference,
    models,
    adapters,
    files,
    fine_tuning,
    permissions,
    webhooks,
    keys,
    usage_routes,
    admin,
)


def create_app(settings: GatewaySettings) -> FastAPI:
    """The application; its database, engines and tasks live from its start-up to its shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _running(settings) as services:
            app.state.services = services
            yield

    app = FastAPI(
        title="reft-serve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        responses=errors.RESPONSES,
        separate_input_output_schemas=False,
    )
    for routes in _ROUTES:
        app.include_router(routes.router)
    app.exception_handler(ReftError)(_named)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_http)
    app.add_middleware(RequestMiddleware)
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)
    _document_keys(app)
    return app


@contextlib.asynccontextmanager
async def _running(settings: GatewaySettings) -> AsyncIterator[Services]:
    configure_tracing(settings.otlp_endpoint)
    database = Database(settings.database)
    await (migrate if settings.migrate else check_schema)(database)
    services = _services(settings, database)
    await asyncio.to_thread(services.store.check)
    await _recover(services, first=True)
    services.ledger.start()
    services.webhook_sender.start()
    services.write_probe.start()
    await services.fleet.start()
    recovering = asyncio.create_task(_recover_forever(services))
    tending = asyncio.create_task(maintenance.run_forever(services))
    try:
        yield services
    finally:
        services.drain()
        recovering.cancel()
        tending.cancel()
        await services.background.join(settings.drain_seconds)
        await services.webhook_sender.close()
        await services.write_probe.close()
        await services.ledger.close()
        await services.quotas.close()
        await services.fleet.close()
        await database.close()


def _services(settings: GatewaySettings, database: Database) -> Services:
    key = settings.engine_key.get_secret_value() if settings.engine_key else None
    members = Discovery(settings.engine_urls, key)
    names = BoundedNames(settings.named_labels)
    store = AdapterStore(settings.store)
    blobs = BlobStore(settings.blobs_url)
    return Services(
        settings,
        database,
        store,
        Fleet(
            members, settings.in_flight_per_engine, settings.queue_seconds, settings.probe_seconds
        ),
        Ledger(database),
        Quotas(settings.limits, settings.limits_storage, names),
        LookupCache(database, settings.base_model, settings.cache_seconds),
        names,
        blobs,
        WebhookSender(database, settings),
        Intake(settings),
        Followers(database, settings.limits),
        _write_probe(settings, database, store, blobs),
    )


def _write_probe(
    settings: GatewaySettings, database: Database, store: AdapterStore, blobs: BlobStore
) -> WriteProbe:
    async def write_row() -> None:
        await database.commit(lambda connection: usage.probe(connection, settings.gateway_name))

    return WriteProbe(
        {
            "the database": (write_row, DatabaseUnusable("The database cannot be written to")),
            "the adapter store": (
                lambda: asyncio.to_thread(store.check),
                StoreUnusable("The adapter store cannot be written to"),
            ),
            "the file store": (blobs.probe, StoreUnusable("The file store cannot be written to")),
        }
    )


async def _recover(services: Services, *, first: bool) -> None:
    """Settle what dead gateways left; at our own start, all that our predecessor left."""
    settings = services.settings
    older = now_ms() - int((settings.request_seconds + _RECOVERY_SECONDS) * 1000)
    count = await services.database.commit(
        lambda connection: usage.recover(connection, settings.gateway_name if first else "", older)
    )
    if count:
        _log.warning(
            "requests that a crashed gateway left open were recorded as interrupted",
            extra={"data": {"count": count}},
        )


async def _recover_forever(services: Services) -> None:
    while True:
        await asyncio.sleep(_RECOVERY_SECONDS)
        try:
            await _recover(services, first=False)
        except Exception:
            _log.exception("recovery failed; retrying")


async def _named(_: Any, exc: Exception) -> JSONResponse:
    assert isinstance(exc, ReftError)
    return errors.answer(exc)


async def _invalid(_: Any, exc: Exception) -> JSONResponse:
    assert isinstance(exc, RequestValidationError)
    return errors.from_validation(exc)


async def _http(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, HTTPException)
    response = errors.from_http(exc)
    # the framework names the methods of one route only, and a path may have several
    if exc.status_code == 405:
        same = (
            route
            for route in request.app.routes
            if route.matches(request.scope)[0] is not Match.NONE
        )
        response.headers["allow"] = ", ".join(
            sorted({method for route in same for method in route.methods})
        )
    return response


def _document_keys(app: FastAPI) -> None:
    """Add the API key to the OpenAPI document, and remove responses that cannot occur."""
    plain = app.openapi

    def documented() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _documented(plain())
        return app.openapi_schema

    app.openapi = documented  # type: ignore[method-assign]


def _documented(document: dict[str, Any]) -> dict[str, Any]:
    document.setdefault("components", {})["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer"}
    }
    document["security"] = [{"key": []}]
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    text = json.dumps(document)
    for name, kept in _SCHEMA_NAMES.items():
        text = text.replace(f'"#/components/schemas/{name}"', f'"#/components/schemas/{kept}"')
        text = text.replace(f'"{name}": {{', f'"{kept}": {{')
    named: dict[str, Any] = json.loads(text)
    return named
