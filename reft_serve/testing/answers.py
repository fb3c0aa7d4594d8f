"""Answers of the fake engine: numbers that follow from prompt, model and seed, in vLLM's shapes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Answer"]


class Engine(Protocol):
    """The settings of a fake engine that its answers follow; see `FakeEngine`."""

    default_tokens: int
    most_tokens: int
    ending: bool
    cached_tokens: int
    break_after: int | None

    async def pause(self, k: int) -> bool:
        """Wait as long as token `k` takes; whether that was any time."""


@dataclass(frozen=True)
class Answer:
    """One answer, whole or as a stream of events."""

    engine: Engine
    body: dict[str, Any]
    chat: bool
    produced: list[int] = field(default_factory=lambda: [0])  # tokens of each choice

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
        inputs = [
            self.body.get("prompt"),
            self.body.get("messages"),
            self.body.get("input"),
            self.body.get("seed"),
        ]
        text = json.dumps([*inputs, self.body["model"], choice, k])
        return f" {int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:4], 16)}"

    @property
    def prompt_tokens(self) -> int:
        prompt = (
            self.body.get("prompt") or self.body.get("messages") or self.body.get("input") or ""
        )
        return len(prompt) if isinstance(prompt, list) else len(prompt.split())

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
            self.produced[0] = k + 1
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
            self.produced[0] = k + 1
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
