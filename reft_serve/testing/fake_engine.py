"""An ASGI application that answers vLLM's HTTP API and computes nothing."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import struct
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from reft_serve.adapters.engine_card import CARD_KEY, EngineCard
from reft_serve.adapters.engine_fault import ALREADY_LOADED, CHAT_TEMPLATE, EngineFault
from reft_serve.errors import AdapterInvalid
from reft_serve.testing.answers import Answer

__all__ = ["FakeEngine"]

BASE = "/models/fake-base"
_NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a "
    "chat template if the tokenizer does not define one."
)


@dataclass(eq=False)
class FakeEngine:
    """State that a test may look at and change. `app` is its ASGI application."""

    token_seconds: float = 0.0  # between tokens
    first_seconds: float = 0.0  # before the first one
    default_tokens: int = 16
    most_tokens: int = 4096  # as if its context ended there
    healthy: bool = True
    ending: bool = False  # told to end: what comes is given up, as vLLM does it
    refuse_adapters: str | None = None
    fail_with: int | None = None
    break_after: int | None = None
    has_chat_template: bool = True
    embeds: bool = True
    adapters: dict[str, str] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    running: int = 0
    # What requests had used when their callers left, by their ids.
    left: dict[str, dict[str, Any]] = field(default_factory=dict)
    cached_tokens: int = 0  # of each prompt
    remember: bool = True
    card: EngineCard | None = None  # its limits

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
                Route("/v1/completions", self._generate, methods=["POST"]),
                Route("/v1/chat/completions", self._generate, methods=["POST"]),
                Route("/v1/responses", self._respond, methods=["POST"]),
                Route("/v1/embeddings", self._embed, methods=["POST"]),
                Route("/classify", self._classify, methods=["POST"]),
                Route("/v1/reft/usage/{request_id}", self._usage),
            ]
        )

    async def _health(self, _: Request) -> Response:
        self.counts["health"] += 1
        return Response(status_code=200 if self.healthy else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(f"vllm:num_requests_running {self.running}.0\n", media_type="text/plain")

    async def _usage(self, request: Request) -> Response:
        used = self.left.get(request.path_params["request_id"])
        return JSONResponse(used) if used else _error(404, "no request with this id ended recently")

    def _note_left(self, request: Request, answer: Answer) -> None:
        self.counts["cancelled"] += 1
        if len(self.left) > 1000:
            self.left.clear()
        self.left[request.headers.get("x-request-id", "")] = answer.usage(
            answer.produced[0] * len(answer.choices)
        )

    async def _models(self, _: Request) -> Response:
        limits = {} if self.card is None else {CARD_KEY: self.card.model_dump(mode="json")}
        base = {
            "id": BASE,
            "object": "model",
            "created": 0,
            "owned_by": "vllm",
            "root": BASE,
            "parent": None,
        }
        adapters = [
            {**base, "id": name, "root": path, "parent": BASE}
            for name, path in self.adapters.items()
        ]
        return JSONResponse({"object": "list", "data": [base | limits, *adapters]})

    async def _load(self, request: Request) -> Response:
        body = await request.json()
        name = body["lora_name"]
        path = body["lora_path"]
        if self.refuse_adapters is not None:
            refused = AdapterInvalid(path, [self.refuse_adapters])
            return _error(400, str(refused), "lora_path", EngineFault.of(refused))
        if name in self.adapters:
            return _error(
                400,
                f"The lora adapter '{name}' has already been loaded.",
                fault=EngineFault(ALREADY_LOADED),
            )
        if not (Path(path) / "reft_config.json").is_file():
            return _error(404, f"No adapter found for {name} at {path}")
        self.adapters[name] = path
        self.counts["load"] += 1
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        self.counts["unload"] += 1
        return Response(f"Success: LoRA adapter '{name}' removed successfully.")

    def _admit(self, body: dict[str, Any]) -> Response | None:
        self.counts["requests"] += 1
        if self.remember:
            self.requests.append(body)
        if self.fail_with is not None:
            return _error(self.fail_with, "the fake engine was set to fail")
        if body["model"] != BASE and body["model"] not in self.adapters:
            return _error(404, f"The model `{body['model']}` does not exist.", "model")
        return None

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        refusal = self._admit(body)
        if refusal is not None:
            return refusal
        chat = request.url.path.endswith("/chat/completions")
        if chat and not self.has_chat_template:
            return _error(400, _NO_TEMPLATE, CHAT_TEMPLATE)
        answer = Answer(self, body, chat)
        if body.get("stream"):
            return StreamingResponse(
                self._counted(request, answer, answer.stream()), media_type="text/event-stream"
            )
        await self._work(request, answer)
        return JSONResponse(answer.whole())

    async def _work(self, request: Request, answer: Answer) -> None:
        self.running += 1
        try:
            for k in range(answer.length):
                if await self.pause(k) and await request.is_disconnected():
                    self._note_left(request, answer)
                    return
                answer.produced[0] = k + 1
        finally:
            self.running -= 1

    async def pause(self, k: int) -> bool:
        """Wait as long as token `k` takes; whether that was any time."""
        seconds = self.token_seconds if k else self.first_seconds
        if seconds:
            await asyncio.sleep(seconds)
        return seconds > 0

    async def _counted(
        self, request: Request, answer: Answer, events: AsyncIterator[str]
    ) -> AsyncIterator[str]:
        self.running += 1
        finished = False
        try:
            async for event in events:
                yield event
            finished = True
        finally:
            self.running -= 1
            if not finished:
                self._note_left(request, answer)

    async def _respond(self, request: Request) -> Response:
        body = await request.json()
        refusal = self._admit(body)
        if refusal is not None:
            return refusal
        answer = Answer(self, body | {"max_tokens": body.get("max_output_tokens")}, False)
        if body.get("stream"):
            return StreamingResponse(
                self._counted(request, answer, answer.typed_stream()),
                media_type="text/event-stream",
            )
        await self._work(request, answer)
        return JSONResponse(answer.response("completed"))

    async def _embed(self, request: Request) -> Response:
        body = await request.json()
        refusal = self._admit(body) if self.embeds else _error(404, "Not Found")
        if refusal is not None:
            return refusal
        data = []
        for k, text in enumerate(_texts(body)):
            seed = json.dumps([text, body["model"]]).encode()
            numbers = struct.unpack("8h", hashlib.md5(seed, usedforsecurity=False).digest())
            vector: Any = [number / 2**15 for number in numbers]
            if body.get("encoding_format") == "base64":
                vector = base64.b64encode(struct.pack("<8f", *vector)).decode()
            data.append({"index": k, "object": "embedding", "embedding": vector})
        return _pooled("embd-fake", body, data)

    async def _classify(self, request: Request) -> Response:
        body = await request.json()
        refusal = self._admit(body) if self.embeds else _error(404, "Not Found")
        if refusal is not None:
            return refusal
        data = []
        for k, text in enumerate(_texts(body)):
            seed = json.dumps([text, body.get("text_pair"), body["model"]]).encode()
            share = hashlib.md5(seed, usedforsecurity=False).digest()[0] / 255
            label = "yes" if share > 0.5 else "no"
            data.append({"index": k, "label": label, "probs": [1 - share, share], "num_classes": 2})
        return _pooled("classify-fake", body, data)


def _texts(body: dict[str, Any]) -> list[Any]:
    """What a request of `/v1/embeddings` or `/classify` holds: texts, or lists of tokens."""
    prompts = body["input"]
    several = isinstance(prompts, list) and prompts and not isinstance(prompts[0], int)
    return prompts if several else [prompts]


def _pooled(id_: str, body: dict[str, Any], data: list[dict[str, Any]]) -> Response:
    count = sum(len(text.split()) if isinstance(text, str) else len(text) for text in _texts(body))
    usage = {
        "prompt_tokens": count,
        "total_tokens": count,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }
    answer = {"id": id_, "object": "list", "created": 1, "model": body["model"]}
    return JSONResponse(answer | {"data": data, "usage": usage})


def _error(
    status: int, message: str, param: str | None = None, fault: EngineFault | None = None
) -> Response:
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": status}
    if fault is not None:
        error |= {"type": fault.type, "faults": fault.faults}
    return JSONResponse({"error": error}, status)
