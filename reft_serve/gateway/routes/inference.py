"""OpenAI's inference endpoints."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from reft_serve.database.keys import Principal
from reft_serve.gateway.bodies import ChatBody, CompletionBody, EmbeddingBody, ResponseBody
from reft_serve.gateway.edge import requires
from reft_serve.gateway.inference import Endpoint, infer
from reft_serve.gateway.services import Services, services_of

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["inference"])
_Caller = Annotated[Principal, Depends(requires("inference"))]
_Services = Annotated[Services, Depends(services_of)]
_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "OpenAI's answer; server-sent events where `stream` is true.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
}
_COMPLETIONS = Endpoint("completions", "/v1/completions", ("max_tokens",), 16)
_CHAT = Endpoint("chat", "/v1/chat/completions", ("max_completion_tokens", "max_tokens"), 256)
_RESPONSES = Endpoint("responses", "/v1/responses", ("max_output_tokens",), 256, typed_events=True)
_EMBEDDINGS = Endpoint("embeddings", "/v1/embeddings", salted=False)


@router.post("/completions", responses=_ANSWER, response_class=Response)
async def completions(body: CompletionBody, request: Request, caller: _Caller, services: _Services) -> Response:
    """Continue a prompt."""
    return await infer(services, request, caller, _COMPLETIONS, body)


@router.post("/chat/completions", responses=_ANSWER, response_class=Response)
async def chat(body: ChatBody, request: Request, caller: _Caller, services: _Services) -> Response:
    """Answer a conversation."""
    return await infer(services, request, caller, _CHAT, body)


@router.post("/responses", responses=_ANSWER, response_class=Response)
async def responses(body: ResponseBody, request: Request, caller: _Caller, services: _Services) -> Response:
    """Answer an input; nothing is stored."""
    return await infer(services, request, caller, _RESPONSES, body)


@router.post("/embeddings", responses=_ANSWER, response_class=Response)
async def embeddings(body: EmbeddingBody, request: Request, caller: _Caller, services: _Services) -> Response:
    """Embed texts, where the engine's model can."""
    return await infer(services, request, caller, _EMBEDDINGS, body)
