"""Every failure in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}` with a status
that the SDKs know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from reft_serve import errors
from reft_serve.gateway.schemas.client_fields import REFUSED
from reft_serve.observability import request_id

__all__ = [
    "RESPONSES",
    "ErrorAnswer",
    "answer",
    "error_body",
    "from_http",
    "from_validation",
    "status_of",
]

# The first class that fits decides.
_STATUS: Mapping[type[errors.ReftError], int] = {
    errors.KeyInvalid: 401,
    errors.NotAllowed: 403,
    errors.NotFound: 404,
    errors.AdapterNotFound: 404,
    errors.Conflict: 409,
    errors.AdapterExists: 409,
    errors.RequestTimeout: 408,
    errors.RequestTooLarge: 413,
    errors.HeadersTooLarge: 431,
    errors.RateLimited: 429,
    errors.ClientError: 400,
    errors.EngineFailed: 502,
    errors.Overloaded: 503,
    errors.EngineUnavailable: 503,
    errors.DatabaseUnusable: 503,
    errors.StoreUnusable: 503,
    errors.TooManyConnections: 503,
    errors.ServiceError: 500,
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every error response."""

    error: ErrorObject


_DESCRIPTIONS = {
    400: "The request is invalid.",
    401: "The API key is missing or invalid.",
    403: "The key lacks the required scope.",
    404: "The object does not exist, or belongs to another tenant.",
    408: "The body did not arrive in time.",
    409: "The name is taken, or the object's state does not allow the operation.",
    413: "The body exceeds a size limit.",
    429: "A limit is exhausted; see retry-after.",
    500: "Internal error of the gateway.",
    502: "Error of the engine.",
    503: "No engine, database or store is available; see retry-after.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in _DESCRIPTIONS.items()
}


def status_of(exc: errors.ReftError) -> int:
    """The HTTP status of a named failure."""
    return next((status for kind, status in _STATUS.items() if isinstance(exc, kind)), 500)


def error_body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    """The JSON of a failure."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(exc: errors.ReftError) -> JSONResponse:
    """The answer to a named failure."""
    status = status_of(exc)
    param = getattr(exc, "param", None)
    if isinstance(exc, errors.ModelNotFound):
        param = "model"
    message = str(exc)
    if status >= 500 and (current := request_id.get()):
        message += f" (request {current})"
    response = _json(
        status, error_body(status, message, param, exc.code), getattr(exc, "retry_after", None)
    )
    # OpenAI's clients repeat what fails with a 5xx, unless this says no
    if isinstance(exc, errors.EngineEnded):
        response.headers["x-should-retry"] = "false"
    if isinstance(exc, errors.RateLimited):
        response.headers.update(exc.headers)
    return response


def from_validation(exc: RequestValidationError) -> JSONResponse:
    """The answer to a request that does not fit its schema: every fault in the message, the first
    one's place in `param`.
    """
    faults = [dict(fault) for fault in exc.errors()]
    places = [".".join(str(part) for part in fault["loc"][1:]) for fault in faults]
    sentences = [
        f"{place or 'the request'}: {_sentence(fault)}"
        for place, fault in zip(places, faults, strict=True)
    ]
    shown = "; ".join(sentences[:5]) + (
        f"; and {len(sentences) - 5} more" if len(sentences) > 5 else ""
    )
    return _json(
        400,
        error_body(400, shown[:2000], places[0][:200] or None if places else None, "invalid_value"),
    )


def from_http(exc: HTTPException) -> JSONResponse:
    """The answer to a failure that the framework itself found."""
    code = _CODES.get(
        exc.status_code, "invalid_request" if exc.status_code < 500 else "server_error"
    )
    response = _json(exc.status_code, error_body(exc.status_code, str(exc.detail), None, code))
    response.headers.update(exc.headers or {})
    return response


def _sentence(fault: Mapping[str, Any]) -> str:
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        name = fault["loc"][-1]
        return f"it is not supported: {REFUSED[name]}" if name in REFUSED else "unknown field"
    return message[:300]


def _json(status: int, body: dict[str, Any], retry_after: float | None = None) -> JSONResponse:
    headers = {} if retry_after is None else {"retry-after": str(max(1, math.ceil(retry_after)))}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body, status, headers)
