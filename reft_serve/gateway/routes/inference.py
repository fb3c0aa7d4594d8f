"""OpenAI's inference endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, get_type_hints

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import from_json

from reft_serve.config import GatewaySettings
from reft_serve.database.keys import Principal
from reft_serve.errors import RequestInvalid
from reft_serve.gateway.http.connections import peer_left
from reft_serve.gateway.inference.exchange import infer
from reft_serve.gateway.inference.request import Endpoint
from reft_serve.gateway.routes.bounded_route import BoundedRoute
from reft_serve.gateway.routes.deps import ServicesDep, caller_of, requires
from reft_serve.gateway.schemas.inference import (
    ChatBody,
    ClassifyBody,
    CompletionBody,
    EmbeddingBody,
    InferenceBody,
    ResponseBody,
)
from reft_serve.gateway.services import Services, services_of

__all__ = ["router"]

# Above this number, faults are counted and not listed.
_FAULTS = 100


class _Direct(BoundedRoute):
    """A route that resolves its four arguments itself, faster than FastAPI's dependency
    injection.
    """

    def json_limits(self, settings: GatewaySettings) -> tuple[int, int]:
        return settings.max_request_bytes, settings.max_json_values

    def make_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Parse the body and call the function."""
        kind: type[InferenceBody] = get_type_hints(self.endpoint)["body"]

        async def handle(request: Request) -> Response:
            services = await services_of(request)
            caller = caller_of(request)
            _check_media_type(request.headers.get("content-type", ""))
            content = await request.body()
            if services.intake.is_large(content):
                body = await _parse_large(services, request, caller, kind, content)
            else:
                body = _parsed(kind, kind.model_validate_json, content)
            del content
            request._body = b""  # free the memory: the body is parsed, and the request may last
            answer: Response = await self.endpoint(body, request, caller, services)
            return answer

        return handle


def _check_media_type(content_type: str) -> None:
    media = content_type.partition(";")[0].strip().lower()
    if media != "application/json" and not (
        media.startswith("application/") and media.endswith("+json")
    ):
        raise RequestInvalid(
            "the request body must be JSON, with the header content-type: application/json"
        )


async def _parse_large(
    services: Services,
    request: Request,
    caller: Principal,
    kind: type[InferenceBody],
    content: bytes,
) -> InferenceBody:
    """Parse in a thread, one body at a time. Faults refer to the parsed value; with bytes, each
    would copy the body.
    """

    def parse() -> InferenceBody:
        try:
            value = from_json(content)
        except ValueError as exc:
            raise RequestInvalid(f"the body is not valid JSON: {exc}") from exc
        return _parsed(kind, kind.model_validate, value)

    async with services.intake.turn(caller.tenant_id, lambda: peer_left(request.scope)):
        return await asyncio.to_thread(parse)


def _parsed(
    kind: type[InferenceBody], validate: Callable[[Any], InferenceBody], value: Any
) -> InferenceBody:
    try:
        return validate(value)
    except ValidationError as exc:
        if exc.error_count() > _FAULTS:
            raise RequestInvalid(
                f"the body has {exc.error_count()} faults; {_known_fields(kind)}"
            ) from exc
        faults = exc.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError(
            [{**fault, "loc": ("body", *fault["loc"])} for fault in faults]
        ) from exc


def _known_fields(kind: type[InferenceBody]) -> str:
    return "its fields are " + ", ".join(sorted(kind.model_fields))


router = APIRouter(prefix="/v1", tags=["inference"], route_class=_Direct)
_Caller = Annotated[Principal, Depends(requires("inference"))]
_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "OpenAI's response; server-sent events if `stream` is true.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {}},
        },
    }
}
_COMPLETIONS = Endpoint("completions", "/v1/completions", ("max_tokens",), 16, engine_default=True)
_CHAT = Endpoint("chat", "/v1/chat/completions", ("max_completion_tokens", "max_tokens"), 256)
_RESPONSES = Endpoint("responses", "/v1/responses", ("max_output_tokens",), 256, typed_events=True)
_EMBEDDINGS = Endpoint("embeddings", "/v1/embeddings")
_CLASSIFY = Endpoint("classify", "/classify")


@router.post("/completions", responses=_ANSWER, response_class=Response)
async def completions(
    body: CompletionBody, request: Request, caller: _Caller, services: ServicesDep
) -> Response:
    """Complete a prompt."""
    return await infer(services, request, caller, _COMPLETIONS, body)


@router.post("/chat/completions", responses=_ANSWER, response_class=Response)
async def chat(
    body: ChatBody, request: Request, caller: _Caller, services: ServicesDep
) -> Response:
    """Generate the next message of a conversation."""
    return await infer(services, request, caller, _CHAT, body)


@router.post("/responses", responses=_ANSWER, response_class=Response)
async def responses(
    body: ResponseBody, request: Request, caller: _Caller, services: ServicesDep
) -> Response:
    """Generate a response to an input. Responses are not stored."""
    return await infer(services, request, caller, _RESPONSES, body)


@router.post("/embeddings", responses=_ANSWER, response_class=Response)
async def embeddings(
    body: EmbeddingBody, request: Request, caller: _Caller, services: ServicesDep
) -> Response:
    """Compute embeddings, if the engine's model supports them."""
    return await infer(services, request, caller, _EMBEDDINGS, body)


@router.post("/classify", responses=_ANSWER, response_class=Response)
async def classify(
    body: ClassifyBody, request: Request, caller: _Caller, services: ServicesDep
) -> Response:
    """Classify or rate texts with an adapter that has a classifier head."""
    return await infer(services, request, caller, _CLASSIFY, body)
