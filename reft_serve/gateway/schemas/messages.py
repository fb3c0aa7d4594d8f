"""Schemas of conversations, for chat and for the Responses API: text, tools and their calls, in
closed models.

An engine fetches what a message refers to (images, sound, files), so nothing but text gets through,
at any depth, also in what a tool returned.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from reft_serve.gateway.schemas.client_fields import ignored_in
from reft_serve.gateway.schemas.request_model import FreeObject, RequestModel

__all__ = [
    "MAX_CALLS",
    "MAX_PARTS",
    "ChatMessage",
    "ChatTool",
    "ChatToolChoice",
    "InputItem",
    "ResponseTool",
    "ResponseToolChoice",
]

MAX_PARTS = 4096
"""Largest number of parts in a message."""
MAX_CALLS = 256
"""Largest number of tool calls in a message."""

# Lists stop at their first fault: an error for each element of each branch of a union would take
# gigabytes.
_FIRST = Field(fail_fast=True)


def _shape(content: object) -> str:
    return "text" if isinstance(content, str) else "parts"


_Id = Annotated[str, Field(max_length=512)]
_ToolName = Annotated[str, Field(min_length=1, max_length=256)]


def _only(*kinds: str, why: str) -> BeforeValidator:
    """A sentence for a type that is not served."""

    def check(kind: object) -> object:
        if kind not in kinds:
            raise PydanticCustomError(
                "not_served",
                "type {given} is not supported: {why}",
                {"given": repr(kind)[:60], "why": why},
            )
        return kind

    return BeforeValidator(check)


_TEXT_ONLY = "only text is supported, in messages and in tool results"
_FUNCTIONS_ONLY = "only functions that the caller runs are supported as tools"


class _Part(RequestModel):
    ignored = ignored_in("content part")


class _ChatPart(_Part):
    type: Annotated[
        Literal["text", "refusal", "input_text", "output_text"],
        _only("text", "refusal", "input_text", "output_text", why=_TEXT_ONLY),
    ]
    text: str | None = None
    refusal: str | None = None


_ChatContent = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[_ChatPart], Field(max_length=MAX_PARTS), _FIRST, Tag("parts")],
    Discriminator(_shape),
]


class _Called(RequestModel):
    ignored = ignored_in("tool call")

    name: _ToolName
    arguments: str


class _ToolCall(RequestModel):
    ignored = ignored_in("tool call")

    id: _Id | None = None
    type: Annotated[Literal["function"], _only("function", why=_FUNCTIONS_ONLY)]
    function: _Called


class ChatMessage(RequestModel):
    """One message of /v1/chat/completions."""

    ignored = ignored_in("message")

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: _ChatContent | None = None
    name: Annotated[str, Field(max_length=512)] | None = None
    tool_calls: Annotated[list[_ToolCall], Field(max_length=MAX_CALLS), _FIRST] | None = None
    tool_call_id: _Id | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _no_empty_calls(self) -> ChatMessage:
        # An answer without calls says so with an empty list, and clients send it back.
        if self.tool_calls == []:
            self.tool_calls = None
        return self


class _Function(RequestModel):
    ignored = ignored_in("tool")

    name: _ToolName
    description: str | None = None
    parameters: FreeObject | None = None
    strict: bool | None = None


class ChatTool(RequestModel):
    """One tool of /v1/chat/completions."""

    ignored = ignored_in("tool")

    type: Annotated[Literal["function"], _only("function", why=_FUNCTIONS_ONLY)]
    function: _Function


class _Name(RequestModel):
    name: _ToolName


class ChatToolChoice(RequestModel):
    """The tool that must be called."""

    type: Annotated[Literal["function"], _only("function", why=_FUNCTIONS_ONLY)]
    function: _Name


class ResponseTool(_Function):
    """One tool of /v1/responses."""

    type: Annotated[Literal["function", "custom"], _only("function", "custom", why=_FUNCTIONS_ONLY)]
    format: FreeObject | None = None


class ResponseToolChoice(RequestModel):
    """The tool that must be called."""

    type: Annotated[Literal["function", "custom"], _only("function", "custom", why=_FUNCTIONS_ONLY)]
    name: _ToolName


class _InputPart(_Part):
    type: Annotated[
        Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"],
        _only(
            "input_text",
            "output_text",
            "text",
            "refusal",
            "summary_text",
            "reasoning_text",
            why=_TEXT_ONLY,
        ),
    ]
    text: str | None = None
    refusal: str | None = None


_Parts = Annotated[list[_InputPart], Field(max_length=MAX_PARTS), _FIRST]
_Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[_Parts, Tag("parts")], Discriminator(_shape)
]


class _Item(RequestModel):
    ignored = ignored_in("input item")


class _MessageItem(_Item):
    ignored = ignored_in("message", "input item")

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: _Content

    @model_validator(mode="after")
    def _whole_answer(self) -> _MessageItem:
        # vLLM reads the first part of an assistant's message and no other.
        if self.role == "assistant" and isinstance(self.content, list):
            self.content = "".join(part.text or part.refusal or "" for part in self.content)
        return self


class _CallItem(_Item):
    type: Literal["function_call"]
    call_id: _Id
    name: _ToolName
    arguments: str
    namespace: Annotated[str, Field(max_length=256)] | None = None


class _CustomCallItem(_Item):
    type: Literal["custom_tool_call"]
    call_id: _Id
    name: _ToolName
    input: str
    namespace: Annotated[str, Field(max_length=256)] | None = None


class _OutputItem(_Item):
    ignored = ignored_in("tool output", "input item")

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: _Id
    output: _Content


class _ReasoningItem(RequestModel):
    ignored = ignored_in("reasoning item")

    type: Literal["reasoning"]
    id: _Id
    summary: _Parts
    content: _Parts | None = None

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, item: Any) -> Any:
        # Clients that store nothing strip the id; vLLM's types require it.
        return (
            {"id": "rs_0", "summary": []} | {k: v for k, v in item.items() if v is not None}
            if isinstance(item, dict)
            else item
        )


_ITEMS = {
    "message": "message",
    "function_call": "call",
    "custom_tool_call": "custom_call",
    "reasoning": "reasoning",
    "function_call_output": "output",
    "custom_tool_call_output": "output",
}


def _item_kind(item: Any) -> str | None:
    kind = (
        (item.get("type") or "message") if isinstance(item, dict) else getattr(item, "type", None)
    )
    return _ITEMS.get(kind) if isinstance(kind, str) else None


def _served_item(item: object) -> object:
    if isinstance(item, dict) and _item_kind(item) is None:
        raise PydanticCustomError(
            "not_served",
            "items of type {given} are not supported: only text messages, reasoning, and function "
            "calls with their results",
            {"given": repr(item.get("type"))[:60]},
        )
    return item


InputItem = Annotated[
    Annotated[_MessageItem, Tag("message")]
    | Annotated[_CallItem, Tag("call")]
    | Annotated[_CustomCallItem, Tag("custom_call")]
    | Annotated[_OutputItem, Tag("output")]
    | Annotated[_ReasoningItem, Tag("reasoning")],
    Discriminator(_item_kind),
    BeforeValidator(_served_item),
]
"""One item of the Responses API's `input`."""
