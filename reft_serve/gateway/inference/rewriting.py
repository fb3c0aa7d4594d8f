"""Rewriting of an engine's response: public model name, usage only if requested, and the tokens
counted.

Engines always report usage in every chunk, so that the delivered tokens are known exactly whenever
a stream ends. The work per chunk is a replacement and a search over its bytes; only chunks that
must be understood are parsed. In JSON a quote inside a string is escaped, so `,"usage":{` in the
bytes is always structure, never text.
"""

from __future__ import annotations

import json
import re
from typing import Any

from reft_serve.errors import EngineUnavailable
from reft_serve.gateway.engines.tokens import Tokens

__all__ = ["Rewriter", "rewrite_whole", "sse_error"]

_USAGE = re.compile(rb',"usage":(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|null)')
_INDEX = re.compile(rb'"index":(\d+)')
_DONE = b"data: [DONE]"
# How vLLM ends, with status 200, what it gives up when it is told to end: no caller asked for that.
_ABORTED = b'"finish_reason":"abort"'
_ENDING = "The engine shut down before the response was complete; try again"
_FINAL_EVENTS = (
    b"event: response.completed",
    b"event: response.incomplete",
    b"event: response.failed",
)


def rewrite_whole(content: bytes, engine_model: str, public_model: str) -> tuple[bytes, Tokens]:
    """An answer that is not streamed.

    Raises:
        EngineUnavailable: the engine gave it up.
    """
    if _ABORTED in content:
        raise EngineUnavailable(_ENDING)
    tokens = Tokens.of(json.loads(content).get("usage"))
    return content.replace(_named(engine_model), _named(public_model)), tokens


class Rewriter:
    """A stream, chunk by chunk."""

    def __init__(self, engine_model: str, public_model: str, wants_usage: bool) -> None:
        self._engine_model = _named(engine_model)
        self._public_model = _named(public_model)
        self._wants_usage = wants_usage
        self._rest = b""
        self._final: Tokens | None = None
        self._latest: dict[bytes, bytes] = {}
        self._deltas = 0
        self.ending = b""
        self.error: dict[str, Any] | None = None

    def feed(self, chunk: bytes) -> bytes:
        """The whole events that are there with this chunk, rewritten. The end mark is kept back in
        `ending`.
        """
        whole, mark, rest = (self._rest + chunk).rpartition(b"\n\n")
        self._rest = rest
        if not mark:
            return b""
        events = [event for event in map(self._event, whole.split(b"\n\n")) if event]
        return b"\n\n".join(events) + b"\n\n" if events else b""

    @property
    def complete(self) -> bool:
        """True if the engine has marked the end of the response."""
        return bool(self.ending)

    @property
    def tokens(self) -> Tokens:
        """Text delivered so far."""
        if self._final is not None:
            return self._final
        each = [Tokens.of(json.loads(usage)) for usage in self._latest.values()]
        prompt = max((tokens.prompt for tokens in each), default=0)
        cached = max((tokens.cached for tokens in each), default=0)
        return Tokens(prompt, cached, sum(tokens.completion for tokens in each) + self._deltas)

    def _event(self, event: bytes) -> bytes:
        if event == _DONE:
            self.ending = self.ending or _DONE + b"\n\n"
            return b""
        if event.startswith(b"event: "):
            return self._typed_event(event.replace(self._engine_model, self._public_model))
        aborted = _ABORTED in event
        if aborted or event.startswith(b'data: {"error"'):
            self.error = (
                {"message": _ENDING, "code": 503} if aborted else json.loads(event[6:])["error"]
            )
            return b""
        event = event.replace(self._engine_model, self._public_model, 1)
        usage = _USAGE.search(event)
        if usage is None or usage[1] == b"null":
            return event
        if b'"choices":[]' in event:
            self._final = Tokens.of(json.loads(usage[1]))
            return event if self._wants_usage else b""
        index = _INDEX.search(event)
        self._latest[index[1] if index else b""] = usage[1]
        return event[: usage.start()] + event[usage.end() :]

    def _typed_event(self, event: bytes) -> bytes:
        """The Responses API's: `event: TYPE` and `data: {...}`."""
        if event.startswith(_FINAL_EVENTS):
            response = json.loads(event.partition(b"data: ")[2])["response"]
            self._final = Tokens.of(response.get("usage"))
            # vLLM says "completed" of an answer that was cut off, too
            if response.get("status") == "incomplete":
                event = event.replace(b"response.completed", b"response.incomplete", 2)
            self.ending = event + b"\n\n"
            return b""
        self._deltas += event.startswith(b"event: response.output_text.delta")
        return event


def sse_error(body: dict[str, Any], typed: bool) -> bytes:
    """A failure inside a stream: the event that OpenAI's clients raise an exception for."""
    if typed:
        body = {"type": "error", **body["error"], "error": body["error"]}
    line = b"data: " + json.dumps(body).encode() + b"\n\n"
    return b"event: error\n" + line if typed else line


def _named(model: str) -> bytes:
    return b'"model":' + json.dumps(model).encode()
