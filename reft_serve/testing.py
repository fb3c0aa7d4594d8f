"""Test an application against reft-serve without an engine: `FakeEngine` answers vLLM's HTTP API
and computes nothing.

Its `app` is an ASGI application. Hand it to a client in the same process, or serve it with any ASGI
server and name its address in a gateway's `REFT_ENGINES`:

    engine = FakeEngine()
    http = httpx.AsyncClient(transport=httpx.ASGITransport(engine.app))
    client = openai.AsyncOpenAI(api_key="none", base_url="http://engine/v1", http_client=http)
    answer = await client.completions.create(model="/models/fake-base", prompt="Rain is",
        max_tokens=4)
    assert engine.requests[0]["prompt"] == "Rain is"

An answer is numbers that follow from prompt, model and seed, so a test can identify an answer. The
fake behaves as vLLM does in what the gateway relies on: chunks and usage, errors in vLLM's shape,
adapters by name and directory, cancellation. Set the fields of `FakeEngine` to make it slow,
unhealthy or broken.
"""

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

__all__ = ["FakeEngine"]

_BASE = "/models/fake-base"
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

    def _note_left(self, request: Request, answer: _Answer) -> None:
        self.counts["cancelled"] += 1
        if len(self.left) > 1000:
            self.left.clear()
        self.left[request.headers.get("x-request-id", "")] = answer.usage(
            answer.made[0] * len(answer.choices)
        )

    async def _models(self, _: Request) -> Response:
        told = {} if self.card is None else {CARD_KEY: self.card.model_dump(mode="json")}
        base = {
            "id": _BASE,
            "object": "model",
            "created": 0,
            "owned_by": "vllm",
            "root": _BASE,
            "parent": None,
        }
        adapters = [
            {**base, "id": name, "root": path, "parent": _BASE}
            for name, path in self.adapters.items()
        ]
        return JSONResponse({"object": "list", "data": [base | told, *adapters]})

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
        if body["model"] != _BASE and body["model"] not in self.adapters:
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
        answer = _Answer(self, body, chat)
        if body.get("stream"):
            return StreamingResponse(
                self._counted(request, answer, answer.stream()), media_type="text/event-stream"
            )
        await self._work(request, answer)
        return JSONResponse(answer.whole())

    async def _work(self, request: Request, answer: _Answer) -> None:
        self.running += 1
        try:
            for k in range(answer.length):
                if await self.pause(k) and await request.is_disconnected():
                    self._note_left(request, answer)
                    return
                answer.made[0] = k + 1
        finally:
            self.running -= 1

    async def pause(self, k: int) -> bool:
        """Wait as long as token `k` takes; whether that was any time."""
        seconds = self.token_seconds if k else self.first_seconds
        if seconds:
            await asyncio.sleep(seconds)
        return seconds > 0

    async def _counted(
        self, request: Request, answer: _Answer, events: AsyncIterator[str]
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
        answer = _Answer(self, body | {"max_tokens": body.get("max_output_tokens")}, False)
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
        given = body["input"]
        texts = (
            given
            if isinstance(given, list) and given and not isinstance(given[0], int)
            else [given]
        )
        data = []
        for k, text in enumerate(texts):
            told = json.dumps([text, body["model"]]).encode()
            numbers = struct.unpack("8h", hashlib.md5(told, usedforsecurity=False).digest())
            vector: Any = [number / 2**15 for number in numbers]
            if body.get("encoding_format") == "base64":
                vector = base64.b64encode(struct.pack("<8f", *vector)).decode()
            data.append({"index": k, "object": "embedding", "embedding": vector})
        count = sum(len(text.split()) if isinstance(text, str) else len(text) for text in texts)
        usage = {
            "prompt_tokens": count,
            "total_tokens": count,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        }
        return JSONResponse(
            {
                "id": "embd-fake",
                "object": "list",
                "created": 1,
                "model": body["model"],
                "data": data,
                "usage": usage,
            }
        )

    async def _classify(self, request: Request) -> Response:
        body = await request.json()
        refusal = self._admit(body) if self.embeds else _error(404, "Not Found")
        if refusal is not None:
            return refusal
        given = body["input"]
        texts = (
            given
            if isinstance(given, list) and given and not isinstance(given[0], int)
            else [given]
        )
        data = []
        for k, text in enumerate(texts):
            told = json.dumps([text, body.get("text_pair"), body["model"]]).encode()
            share = hashlib.md5(told, usedforsecurity=False).digest()[0] / 255
            label = "yes" if share > 0.5 else "no"
            data.append({"index": k, "label": label, "probs": [1 - share, share], "num_classes": 2})
        count = sum(len(text.split()) if isinstance(text, str) else len(text) for text in texts)
        usage = {
            "prompt_tokens": count,
            "total_tokens": count,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        }
        return JSONResponse(
            {
                "id": "classify-fake",
                "object": "list",
                "created": 1,
                "model": body["model"],
                "data": data,
                "usage": usage,
            }
        )


@dataclass(frozen=True)
class _Answer:
    engine: FakeEngine
    body: dict[str, Any]
    chat: bool
    made: list[int] = field(default_factory=lambda: [0])  # tokens of each choice

    @property
    def length(self) -> int:
        asked = self.body.get("max_completion_tokens") or self.body.get("max_tokens")
        return min(
            asked if asked is not None else self.engine.default_tokens, self.engine.most_tokens
        )

    @property
    def reason(self) -> str:
        return "abort" if self.engine.ending else "length"

    @property
    def choices(self) -> range:
        prompt = self.body.get("prompt")
        prompts = (
            len(prompt)
            if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
            else 1
        )
        return range(prompts * (self.body.get("n") or 1))

    def word(self, choice: int, k: int) -> str:
        told = [
            self.body.get("prompt"),
            self.body.get("messages"),
            self.body.get("input"),
            self.body.get("seed"),
        ]
        text = json.dumps([*told, self.body["model"], choice, k])
        return f" {int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:4], 16)}"

    @property
    def prompt_tokens(self) -> int:
        told = self.body.get("prompt") or self.body.get("messages") or self.body.get("input") or ""
        return len(told) if isinstance(told, list) else len(told.split())

    def usage(self, completion: int) -> dict[str, Any]:
        total = self.prompt_tokens + completion
        details = (
            {"cached_tokens": self.engine.cached_tokens} if self.engine.cached_tokens else None
        )
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": total,
            "completion_tokens": completion,
            "prompt_tokens_details": details,
        }

    def head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        name = f"chat.completion{kind}" if self.chat else "text_completion"
        return {"id": f"{prefix}-fake", "object": name, "created": 1, "model": self.body["model"]}

    def whole(self) -> dict[str, Any]:
        choices = []
        for i in self.choices:
            text = (
                "" if self.engine.ending else "".join(self.word(i, k) for k in range(self.length))
            )
            said = (
                {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            )
            choices.append({"index": i, **said, "logprobs": None, "finish_reason": self.reason})
        return {
            **self.head(""),
            "choices": choices,
            "usage": self.usage(self.length * len(self.choices)),
        }

    async def stream(self) -> AsyncIterator[str]:
        options = self.body.get("stream_options") or {}
        if self.chat:
            for i in self.choices:
                yield self._chunk(
                    i, {"delta": {"role": "assistant", "content": ""}}, None, 0, options
                )
        for k in range(self.length):
            if k == self.engine.break_after:
                error = {
                    "message": "the fake engine broke",
                    "type": "InternalServerError",
                    "param": None,
                    "code": 500,
                }
                yield _event({"error": error})
                yield "data: [DONE]\n\n"
                return
            await self.engine.pause(k)
            self.made[0] = k + 1
            if self.engine.ending:
                yield self._chunk(
                    0, {"delta": {}} if self.chat else {"text": ""}, self.reason, k, options
                )
                break
            for i in self.choices:
                word = self.word(i, k)
                end = "length" if k == self.length - 1 else None
                yield self._chunk(
                    i,
                    {"delta": {"content": word}} if self.chat else {"text": word},
                    end,
                    k + 1,
                    options,
                )
        if options.get("include_usage"):
            yield _event(
                {
                    **self.head(".chunk"),
                    "choices": [],
                    "usage": self.usage(self.length * len(self.choices)),
                }
            )
        yield "data: [DONE]\n\n"

    def _chunk(
        self, i: int, said: dict[str, Any], end: str | None, count: int, options: dict[str, Any]
    ) -> str:
        choice = {"index": i, **said, "logprobs": None, "finish_reason": end}
        chunk = {**self.head(".chunk"), "choices": [choice]}
        if options.get("continuous_usage_stats"):
            chunk["usage"] = self.usage(count)
        return _event(chunk)

    def response(self, status: str) -> dict[str, Any]:
        text = "".join(self.word(0, k) for k in range(self.length))
        content: list[dict[str, Any]] = [
            {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
        ]
        message = {
            "id": "msg_fake",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": content,
        }
        usage = {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": self.length,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + self.length,
        }
        return {
            "id": "resp_fake",
            "object": "response",
            "created_at": 1,
            "model": self.body["model"],
            "status": status,
            "output": [message] if status == "completed" else [],
            "usage": usage if status == "completed" else None,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": None,
            "temperature": 1.0,
            "top_p": 1.0,
        }

    async def typed_stream(self) -> AsyncIterator[str]:
        yield _typed(
            {
                "type": "response.created",
                "sequence_number": 0,
                "response": self.response("in_progress"),
            }
        )
        for k in range(self.length):
            await self.engine.pause(k)
            self.made[0] = k + 1
            yield _typed(
                {
                    "type": "response.output_text.delta",
                    "sequence_number": k + 1,
                    "item_id": "msg_fake",
                    "output_index": 0,
                    "content_index": 0,
                    "delta": self.word(0, k),
                    "logprobs": [],
                }
            )
        last = {
            "type": "response.completed",
            "sequence_number": self.length + 1,
            "response": self.response("completed"),
        }
        yield _typed(last)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def _typed(data: dict[str, Any]) -> str:
    return f"event: {data['type']}\n" + _event(data)


def _error(
    status: int, message: str, param: str | None = None, fault: EngineFault | None = None
) -> Response:
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": status}
    if fault is not None:
        error |= {"type": fault.type, "faults": fault.faults}
    return JSONResponse({"error": error}, status)
