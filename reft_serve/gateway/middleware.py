"""The outermost middleware: request ids, authentication, and the handler of uncaught errors.

Every path needs a key except the health checks.
"""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reft_serve import errors
from reft_serve.database.connection import database_user
from reft_serve.database.keys import Principal
from reft_serve.gateway.http.tracing import span
from reft_serve.gateway.schemas.errors import answer
from reft_serve.gateway.services import Services
from reft_serve.observability import REQUEST_SECONDS, REQUESTS, request_id
from reft_serve.storage.files import NO_SPACE

__all__ = ["OPEN_PATHS", "RequestMiddleware"]

_log = logging.getLogger(__name__)
OPEN_PATHS = frozenset({"/health/live", "/health/ready"})


class RequestMiddleware:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = f"req_{uuid.uuid4().hex}"
        request_id.set(identity)
        begun = time.monotonic()
        status = 0
        services: Services = scope["app"].state.services
        state = scope.setdefault("state", {})

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity.encode())]
                if services.draining:  # the caller's next request shall find a gateway that stays
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        try:
            with span(
                f"{scope['method']} {scope['path'][:80]}", headers, {"reft.request_id": identity}
            ):
                await self._serve(services, scope, receive, sending, headers)
        except Exception as exc:
            if status:  # the answer has begun: all that is left is to break it off
                _log.exception("a response was cut off")
                raise
            await _last_resort(exc)(scope, receive, sending)
        finally:
            for lease in state.get("leases", ()):
                lease.release()
            _account(scope, status, time.monotonic() - begun)

    async def _serve(
        self,
        services: Services,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: dict[str, str],
    ) -> None:
        try:
            if scope["path"] not in OPEN_PATHS:
                caller = scope["state"]["caller"] = await _authenticate(services, headers)
                database_user.set(caller.tenant_id)
        except errors.ReftError as exc:
            await answer(exc)(scope, receive, send)
            return
        await self._app(scope, receive, send)


async def _authenticate(services: Services, headers: dict[str, str]) -> Principal:
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise errors.KeyInvalid("an API key is required: Authorization: Bearer KEY")
    principal = await services.lookup.principal(secret.strip())
    if principal is None:
        raise errors.KeyInvalid("this API key is unknown, expired or revoked")
    return principal


def _last_resort(exc: Exception) -> Any:
    if isinstance(exc, errors.ReftError):
        return answer(exc)
    if isinstance(exc, (SQLAlchemyError, ConnectionError)):
        _log.error("the database failed", exc_info=exc)
        return answer(errors.DatabaseUnusable("the database does not respond; try again"))
    if isinstance(exc, OSError) and exc.errno in NO_SPACE:
        _log.error("the disk cannot be written to", exc_info=exc)
        return answer(errors.StoreUnusable("The gateway's disk cannot be written to; try again"))
    _log.error("a request failed", exc_info=exc)
    return answer(errors.ServiceError("Internal error"))


def _account(scope: Scope, status: int, seconds: float) -> None:
    services: Services = scope["app"].state.services
    caller: Principal | None = scope.get("state", {}).get("caller")
    route = getattr(scope.get("route"), "path", "none")
    tenant = services.names.label(caller.tenant if caller else None)
    REQUESTS.labels(route, str(status or 499), tenant).inc()
    REQUEST_SECONDS.labels(route).observe(seconds)
    if route not in OPEN_PATHS and _log.isEnabledFor(logging.INFO):
        data = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status or 499,
            "seconds": round(seconds, 4),
            "tenant": caller.tenant if caller else None,
            "key": caller.key_id if caller else None,
            **scope.get("state", {}).get("facts", {}),
        }
        _log.info("request", extra={"data": data})
