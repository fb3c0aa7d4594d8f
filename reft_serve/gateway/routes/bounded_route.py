"""Routes that check a request before they read it: scopes, size, memory and time, and only then the
function.

Scopes are checked before a byte of the body is read. A body is read up to its route's own limit,
within its time, and counted in the budgets of the process; what is refused is not kept. JSON is
checked on its bytes before it is parsed.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastapi import Request, Response, params
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import Message

from reft_serve import errors
from reft_serve.config import GatewaySettings
from reft_serve.gateway.http.budget import Budget, Lease
from reft_serve.gateway.http.connections import peer_left
from reft_serve.gateway.http.json_check import check_json
from reft_serve.gateway.http.streaming import ClientGone, while_there
from reft_serve.gateway.routes.deps import Requires
from reft_serve.gateway.services import Services

__all__ = [
    "BODY_BYTES_PER_SECOND",
    "FORM_BYTES",
    "FORM_PARTS",
    "MANAGEMENT_BYTES",
    "MANAGEMENT_VALUES",
    "QUERY_PARAMETERS",
    "UPLOAD_SECONDS",
    "BoundedRoute",
]

MANAGEMENT_BYTES = 64 << 10
"""Largest JSON body in bytes, except inference requests."""
MANAGEMENT_VALUES = 4096
"""Largest number of values in a JSON body, except inference requests."""
QUERY_PARAMETERS = 128
"""Largest number of query parameters."""
FORM_PARTS = 16
"""Largest number of files, and of fields, in one upload."""
FORM_BYTES = 64 << 10
"""Largest size in bytes of an upload's field, and of an upload without its files."""
BODY_BYTES_PER_SECOND = 32 << 10
"""Minimum rate of a body after the first `REFT_BODY_SECONDS`."""
UPLOAD_SECONDS = 3600.0
"""Longest time that an upload may take to arrive."""
_NOT_MANAGEMENT = frozenset({"inference", "metrics"})
_STEP = 1 << 20
_GONE = 499
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class BoundedRoute(APIRoute):
    """A route with a limit on its body: nothing, a little JSON, or an upload."""

    #: The setting that bounds an upload.
    upload_setting: ClassVar[str] = "max_upload_bytes"

    def get_route_handler(self) -> _Handler:
        """Check, read and call the function."""
        handle = self.make_handler()
        scopes = list(_scopes_of(self.dependant))
        is_management = all(_NOT_MANAGEMENT.isdisjoint(required.scopes) for required in scopes)
        takes_body = bool(self.dependant.body_params)
        takes_form = _takes_form(self.dependant)

        async def bounded(request: Request) -> Response:
            caller = request.scope["state"].get("caller")
            for required in scopes:
                required.check(caller)
            if request.scope["query_string"].count(b"&") >= QUERY_PARAMETERS:
                raise errors.RequestInvalid(f"the URL has more than {QUERY_PARAMETERS} parameters")
            if caller is None:
                return await handle(request)
            services: Services = request.app.state.services
            if is_management:
                await services.quotas.take_management(caller)
            body = _Body(services, request, caller.tenant_id)
            await body.take(services.intake.requests, 1)
            try:
                if takes_form:
                    return await self._upload(body, handle)
                return await self._answer(body, handle, takes_body)
            except (ClientDisconnect, ClientGone):
                return Response(status_code=_GONE)

        return bounded

    def make_handler(self) -> _Handler:
        """The function that answers once the body has been read."""
        return super().get_route_handler()

    def json_limits(self, settings: GatewaySettings) -> tuple[int, int]:
        """(most bytes, most values) of a JSON body."""
        return min(MANAGEMENT_BYTES, settings.max_request_bytes), MANAGEMENT_VALUES

    async def _answer(self, body: _Body, handle: _Handler, takes_body: bool) -> Response:
        if not takes_body:
            return await handle(body.request)
        most_bytes, most_values = self.json_limits(body.services.settings)
        content = await body.read(most_bytes)
        request = body.request
        intake = body.services.intake
        if intake.is_large(content):
            async with intake.turn(body.tenant, body.left):
                values = await asyncio.to_thread(check_json, content, most_values)
        else:
            values = check_json(content, most_values)
        body.grow(values * intake.BYTES_PER_VALUE)
        request.scope["state"]["body_bytes"] = len(content)
        request._body = content
        return await handle(request)

    async def _upload(self, body: _Body, handle: _Handler) -> Response:
        request = body.request
        most = getattr(body.services.settings, self.upload_setting) + FORM_BYTES
        form = await body.read_form(most)
        try:
            request._form = form
            async with while_there(request.receive):
                return await handle(request)
        finally:
            await form.close()


@dataclass(slots=True)
class _Body:
    """A request whose body is still to come."""

    services: Services
    request: Request
    tenant: str
    taken: int = 0
    begun: float = field(default_factory=time.monotonic)
    lease: Lease | None = None

    def left(self) -> bool:
        """True if the client has closed its side."""
        return peer_left(self.request.scope)

    async def take(self, budget: Budget, amount: int) -> Lease:
        """Take a part of a budget until the answer has been sent."""
        lease = await budget.take(self.tenant, amount, self.left)
        self.request.scope["state"].setdefault("leases", []).append(lease)
        return lease

    def grow(self, amount: int) -> None:
        """Count the parsed parts of the body."""
        if self.lease is not None:
            self.lease.grow(amount)

    async def read(self, most: int) -> bytes:
        """All of a body that is kept in memory.

        Raises:
            RequestTooLarge, RequestTimeout, RateLimited, ClientGone: it is not taken.
        """
        declared = self._declared(most)
        intake = self.services.intake
        size = intake.SMALL if declared is None else declared
        self.lease = await self.take(intake.memory_for(size), size * intake.COPIES)
        self.begun = time.monotonic()
        parts = []
        async for part in self._parts(most):
            if declared is None and self.taken > size:
                size = most
                self.lease = await self.take(intake.memory_for(size), size * intake.COPIES)
            parts.append(part)
        content: bytes = parts[0] if len(parts) == 1 else b"".join(parts)
        return content

    async def read_form(self, most: int) -> FormData:
        """An upload, its files on disk.

        Raises:
            RequestInvalid: it is not multipart/form-data.
            RequestTooLarge, RequestTimeout, RateLimited: it is not taken.
            StoreUnusable: the disk is full.
        """
        kind = self.request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "multipart/form-data":
            raise errors.RequestInvalid(
                "the request body must be multipart/form-data, with that content-type"
            )
        declared = self._declared(most)
        intake = self.services.intake
        await self.take(intake.uploads, 1)
        lease = await self.take(intake.disk, max(0, (declared or 0) - FORM_BYTES))

        async def parts() -> Any:
            async for part in self._parts(most):
                if self.taken > lease.amount + FORM_BYTES:
                    lease.grow(_STEP)
                yield part

        parser = _Parser(
            self.request.headers,
            parts(),
            max_files=FORM_PARTS,
            max_fields=FORM_PARTS,
            max_part_size=FORM_BYTES,
        )
        try:
            return await parser.parse()
        except MultiPartException as exc:
            raise errors.RequestInvalid(exc.message) from exc
        except OSError as exc:
            if exc.errno in _NO_SPACE:
                raise errors.StoreUnusable("the gateway's disk is full; try again") from exc
            raise

    def _declared(self, most: int) -> int | None:
        declared = self.request.headers.get("content-length", "")
        if not (declared.isascii() and declared.isdigit()):
            return None
        if (size := int(declared[:20])) > most:
            raise _too_large(most)
        return size

    async def _parts(self, most: int) -> Any:
        """The body as it comes.

        Raises:
            RequestTooLarge, RequestTimeout: it is too long, or too slow.
            ClientDisconnect: the caller left.
        """
        more = True
        while more:
            message = await self._next()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            part = message.get("body", b"")
            more = message.get("more_body", False)
            self.taken += len(part)
            if self.taken > most:
                raise _too_large(most)
            if part:
                yield part

    async def _next(self) -> Message:
        seconds = self.services.settings.body_seconds
        allowed = min(seconds + self.taken / BODY_BYTES_PER_SECOND, UPLOAD_SECONDS)
        try:
            async with asyncio.timeout(min(self.begun + allowed - time.monotonic(), seconds)):
                return await self.request.receive()
        except TimeoutError as exc:
            raise errors.RequestTimeout("the request body did not arrive in time") from exc


class _Parser(MultiPartParser):
    spool_max_size = 64 << 10


def _too_large(most: int) -> errors.RequestTooLarge:
    return errors.RequestTooLarge(f"the request has more than the {most} bytes allowed here")


def _scopes_of(dependant: Dependant) -> Iterator[Requires]:
    if isinstance(dependant.call, Requires):
        yield dependant.call
    for each in dependant.dependencies:
        yield from _scopes_of(each)


def _takes_form(dependant: Dependant) -> bool:
    return any(isinstance(each.field_info, params.Form) for each in dependant.body_params)
