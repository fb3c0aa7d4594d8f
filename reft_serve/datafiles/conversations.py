"""Conversations of a data file as OpenAI's clients write them, in one normal form. No torch.

The normal form is OpenAI's own, without its alternatives: `content` is a text or not given, tool
calls are in `tool_calls` with their arguments as a JSON string, their results in `tool` turns, and
tools in `tools`. Fields that are null, and the fields that an SDK's message objects add, are not
there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from reft_serve.datafiles.faults import kind_of

__all__ = [
    "MAX_PARAMETER_DEPTH",
    "MAX_TOOLS",
    "MAX_TURNS",
    "DataModel",
    "FilledText",
    "FunctionCall",
    "Message",
    "Messages",
    "Text",
    "Tool",
    "ToolCall",
    "normal_conversation",
    "not_a_bool",
]

MAX_TURNS = 2048
MAX_TOOLS = 128
MAX_PARAMETER_DEPTH = 32
_MOST_KEYS = 64


def _sound(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(
            f"holds half of a surrogate pair ({text[exc.start]!r}), which is not a character"
        ) from exc
    return text


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def not_a_bool(value: object) -> object:
    """Python takes True for 1; JSON does not."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _text_of_parts(value: object) -> object:
    """The text of a list of text parts, joined as vLLM joins those of a request."""
    if not isinstance(value, list):
        return value
    if len(value) > MAX_TURNS:
        raise ValueError(f"has {len(value):,} parts: at most {MAX_TURNS:,} are allowed")
    texts = []
    for k, part in enumerate(value):
        known = (
            isinstance(part, dict)
            and part.keys() <= {"type", "text"}
            and part.get("type") == "text"
        )
        if not known or not isinstance(part.get("text"), str):
            raise ValueError(
                f'holds a part {k} that is not {{"type": "text", "text": "..."}}: only text can '
                "be trained on"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _not_given(value: object) -> object:
    if value:
        raise ValueError("is not supported: it cannot be trained on")
    return None


Text = Annotated[str, AfterValidator(_sound)]
FilledText = Annotated[Text, AfterValidator(_filled)]
_Content = Annotated[Text, BeforeValidator(_text_of_parts)]
_NotGiven = Annotated[None, BeforeValidator(_not_given)]


class DataModel(BaseModel):
    """Base of every part of a row: immutable and strict about types."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class _Closed(DataModel):
    model_config = ConfigDict(extra="forbid")


def _arguments(value: object) -> object:
    """Arguments as a JSON string; some exports hold the object itself."""
    return json.dumps(value) if isinstance(value, dict) else value or "{}"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _json_object(text: str) -> str:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        raise ValueError("is not JSON") from exc
    if not isinstance(value, dict):
        raise ValueError(f"is the JSON of {kind_of(value)}, not of an object")
    _bounded(value)
    return text


def _bounded(value: Any) -> Any:
    """The value, if it is not nested too deeply for a chat template."""
    level = [value]
    depth = 0
    while level:
        if depth > MAX_PARAMETER_DEPTH:
            raise ValueError(f"is nested more than {MAX_PARAMETER_DEPTH} levels deep")
        held = (
            item.values() if isinstance(item, dict) else item
            for item in level
            if isinstance(item, dict | list)
        )
        level = [item for items in held for item in items]
        depth = depth + 1
    return value


class FunctionCall(_Closed):
    """A function call of an assistant turn. `arguments` is the JSON of an object."""

    name: Annotated[FilledText, Field(max_length=128)]
    arguments: Annotated[Text, AfterValidator(_json_object), BeforeValidator(_arguments)] = "{}"


class ToolCall(_Closed):
    """One call of an assistant's turn."""

    id: Annotated[FilledText, Field(max_length=128)]
    type: Literal["function"] = "function"
    function: FunctionCall


class _Function(_Closed):
    name: Annotated[FilledText, Field(max_length=128)]
    description: Text | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_bounded)] | None = None
    strict: bool | None = None


class Tool(_Closed):
    """A function that the assistant may call."""

    type: Literal["function"]
    function: _Function


_Calls = Annotated[tuple[ToolCall, ...], Field(strict=False, max_length=MAX_TOOLS)]


class Message(_Closed):
    """One turn. `weight` is 0 on an assistant turn that is context only; `content` is None next to
    tool calls alone.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Content | None = None
    name: FilledText | None = None
    weight: Annotated[Literal[0, 1] | None, BeforeValidator(not_a_bool)] = None
    tool_calls: _Calls | None = None
    tool_call_id: Annotated[FilledText, Field(max_length=128)] | None = None
    # Fields of an SDK's message objects that must be empty: nothing of them can be trained on.
    audio: _NotGiven = None
    refusal: _NotGiven = None
    reasoning: _NotGiven = None
    reasoning_content: _NotGiven = None

    @field_validator("content")
    @classmethod
    def _said(cls, content: str | None, info: ValidationInfo) -> str | None:
        # A tool may answer nothing.
        return content if content is None or info.data.get("role") == "tool" else _filled(content)

    @model_validator(mode="after")
    def _whole(self) -> Message:
        if self.weight is not None and self.role != "assistant":
            raise ValueError(
                f"has a weight, but its role is {self.role}: only assistant turns are learnt"
            )
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError(
                f"has tool calls, but its role is {self.role}: only the assistant calls tools"
            )
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError(
                f'has {"no" if self.role == "tool" else "a"} "tool_call_id", but its role is '
                f"{self.role}"
            )
        if self.content is None and self.tool_calls is None:
            raise ValueError('has no "content"')
        return self


def _sound_messages(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not messages:
        raise ValueError("is empty")
    called: set[str] = set()
    for k, message in enumerate(messages):
        if message.tool_calls is not None:
            called = {call.id for call in message.tool_calls}
        elif message.role == "tool" and message.tool_call_id not in called:
            raise ValueError(
                f"answers in turn {k} a tool call that the assistant's last turn before it did "
                "not make"
            )
    return messages


Messages = Annotated[tuple[Message, ...], Field(strict=False), AfterValidator(_sound_messages)]


def normal_conversation(holder: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Normalise a conversation: drop nulls, rename `functions` to `tools`, and normalise the turns
    under `keys`. Values of other types stay as they are, for the models to reject.

    Raises:
        ValueError: it has more turns or tools than are allowed.
    """
    fields = _without_nulls(holder)
    functions = fields.pop("functions", None)
    if functions and isinstance(functions, list) and not fields.get("tools"):
        fields["tools"] = [{"type": "function", "function": function} for function in functions]
    if not fields.get("tools", True):
        del fields["tools"]
    if isinstance(tools := fields.get("tools"), list):
        _count("tools", tools, MAX_TOOLS)
        fields["tools"] = [_normal_tool(tool) for tool in tools]
    for key in keys:
        if isinstance(turns := fields.get(key), list):
            _count(key, turns, MAX_TURNS)
            _count_calls(turns)
            fields[key] = _normal_turns(turns)
    return fields


def _count(name: str, items: list[Any], most: int) -> None:
    if len(items) > most:
        raise ValueError(f"has {len(items):,} {name}: at most {most:,} are allowed")


def _count_calls(turns: list[Any]) -> None:
    lists = [
        turn["tool_calls"]
        for turn in turns
        if isinstance(turn, dict) and isinstance(turn.get("tool_calls"), list)
    ]
    _count("tool calls", [call for calls in lists for call in calls], MAX_TURNS)


def _with_few_keys(value: Mapping[str, Any]) -> dict[str, Any]:
    """Reject a turn, call or tool with too many keys: each unknown key would be a fault."""
    if len(value) > _MOST_KEYS:
        raise ValueError(f"has {len(value):,} keys in one object: at most {_MOST_KEYS} are allowed")
    return _without_nulls(value)


def _without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: held for key, held in value.items() if held is not None or key not in _NULLABLE}


# Null means not given. A key that is not known is refused by its name, null or not.
_NULLABLE = frozenset(
    {
        *(
            "messages",
            "tools",
            "functions",
            "parallel_tool_calls",
            "function_call",
            "description",
            "parameters",
            "strict",
        ),
        *("content", "name", "weight", "tool_calls", "tool_call_id", "id", "type", "index"),
        *("annotations", "audio", "refusal", "reasoning", "reasoning_content"),
    }
)


def _normal_tool(tool: Any) -> Any:
    """A tool, or a call of one, without nulls."""
    if not isinstance(tool, dict):
        return tool
    fields = _with_few_keys(tool)
    if isinstance(function := fields.get("function"), dict):
        fields["function"] = _with_few_keys(function)
    return fields


def _normal_turns(turns: list[Any]) -> list[Any]:
    """Turns without nulls, and with the calls of the `function_call` form as tool calls, which need
    ids.
    """
    normal: list[Any] = []
    last_call = ""
    for k, held in enumerate(turns):
        if not isinstance(held, dict):
            normal.append(held)
            continue
        turn = _with_few_keys(held)
        if isinstance(turn.get("annotations"), list):
            del turn["annotations"]
        if "function_call" in turn and "tool_calls" not in turn:
            last_call = f"call_{k}"
            turn["tool_calls"] = [
                {"id": last_call, "type": "function", "function": turn.pop("function_call")}
            ]
        elif turn.get("role") == "function" and last_call and "tool_call_id" not in turn:
            turn |= {"role": "tool", "tool_call_id": last_call}
        calls = turn.get("tool_calls")
        if calls == []:
            del turn["tool_calls"]
        elif isinstance(calls, list):
            turn["tool_calls"] = [_normal_tool(call) for call in calls]
            if turn.get("content") in ("", []):
                del turn["content"]
        normal.append(turn)
    return normal
