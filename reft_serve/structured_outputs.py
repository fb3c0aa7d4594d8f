"""Bounds on what a structured output may ask for, checked in one linear pass before any parser sees
it.

The gateway checks requests as they are read, the engine checks what its own server makes of them
(tools, for one).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from reft_serve.errors import RequestInvalid

__all__ = [
    "MAX_BYTES",
    "MAX_CHOICES",
    "MAX_DEPTH",
    "MAX_GRAMMAR_BYTES",
    "MAX_ITEMS",
    "MAX_LENGTH",
    "MAX_REGEX_BYTES",
    "MAX_STRING",
    "MAX_VALUES",
    "check_constraint",
    "check_request",
]

# Bytes of the strings and names of one schema or structural tag, and of a list of choices.
MAX_BYTES = 262_144
MAX_GRAMMAR_BYTES = 32_768
MAX_REGEX_BYTES = 8_192
# Characters of one string (a `const`, a choice, a name) in a schema.
MAX_STRING = 8_192
# Elements of `enum` and `choice`.
MAX_CHOICES = 2_048
# JSON values of all schemas of a request.
MAX_VALUES = 50_000
MAX_DEPTH = 64
# `minItems`, `maxItems`, `minProperties`, `maxProperties`, `minContains`, `maxContains`.
MAX_ITEMS = 4_096
# `minLength`, `maxLength` and counts of repetition in regular expressions.
MAX_LENGTH = 100_000

_ITEMS = frozenset(
    {"minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains"}
)
_LENGTHS = frozenset({"minLength", "maxLength"})
# Of a regular expression or GBNF, and of Lark.
_COUNTS = re.compile(r"\{(\d*)(?:,(\d*))?\}|~ ?(\d+)(?:\.\.(\d+))?")


class _Budget:
    """Remaining budget of a request's bounds."""

    def __init__(self) -> None:
        self.values = MAX_VALUES


def check_request(body: Mapping[str, Any]) -> None:
    """Check the structured outputs and the tools of a request to the gateway.

    Raises:
        RequestInvalid: a bound is exceeded; the message names it, `param` the field.
    """
    budget = _Budget()
    for param, kind, spec in _constraints(body):
        _check(kind, spec, param, budget)


def check_constraint(kind: str, spec: Any, param: str = "structured_outputs") -> None:
    """Check one constraint. `kind` is a field of `structured_outputs`.

    Raises:
        RequestInvalid: a bound is exceeded; the message names it.
    """
    _check(kind, spec, param, _Budget())


def _constraints(body: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    if (form := body.get("response_format")) is not None:
        yield "response_format", "json", form
    if (form := _member(body.get("text"), "format")) is not None:
        yield "text.format", "json", form
    outputs = body.get("structured_outputs")
    if isinstance(outputs, Mapping):
        for name in outputs:
            if outputs[name] is not None:
                yield f"structured_outputs.{str(name)[:64]}", str(name), outputs[name]
    tools = body.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        yield f"tools[{index}]", "json", tool


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _check(kind: str, spec: Any, param: str, budget: _Budget) -> None:
    if kind == "regex" and isinstance(spec, str):
        _check_size(spec, MAX_REGEX_BYTES, param, "a regular expression")
        _check_counts(spec, param)
    elif kind == "grammar" and isinstance(spec, str):
        _check_size(spec, MAX_GRAMMAR_BYTES, param, "a grammar")
        _check_counts(spec, param)
    elif kind in ("json", "structural_tag") and isinstance(spec, str):
        _check_size(spec, MAX_BYTES, param, "a schema")
        _check_values(_parsed(spec, param), param, budget)
    elif kind == "choice" and isinstance(spec, list):
        _check_choices(spec, param)
        _check_values(spec, param, budget)
    else:
        _check_values(spec, param, budget)


def _parsed(text: str, param: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise RequestInvalid(f"{param} is not JSON", param) from exc


def _check_values(root: Any, param: str, budget: _Budget) -> None:
    """One pass over a JSON value without recursion; it ends at the first bound that is exceeded."""
    left = MAX_BYTES
    waiting: list[tuple[Any, int]] = [(root, 0)]
    while waiting:
        value, depth = waiting.pop()
        budget.values -= 1
        if budget.values < 0:
            raise _exceeded(param, f"schemas with more than {MAX_VALUES:,} values in all")
        if isinstance(value, str):
            left -= _check_string(value, param)
        elif isinstance(value, int | float):
            left -= 8
        elif isinstance(value, Mapping | list):
            if depth == MAX_DEPTH:
                raise _exceeded(param, f"nesting deeper than {MAX_DEPTH} levels")
            if len(value) > budget.values:
                raise _exceeded(param, f"schemas with more than {MAX_VALUES:,} values in all")
            if isinstance(value, Mapping):
                for name in value:
                    left -= _check_string(name, param)
                _check_keywords(value, param)
                waiting.extend((member, depth + 1) for member in value.values())
            else:
                waiting.extend((member, depth + 1) for member in value)
        if left < 0:
            raise _exceeded(param, f"more than {MAX_BYTES:,} bytes")


def _check_string(text: str, param: str) -> int:
    if len(text) > MAX_STRING:
        raise _exceeded(param, f"a string of more than {MAX_STRING:,} characters")
    return len(text.encode(errors="replace"))


def _check_keywords(schema: Mapping[str, Any], param: str) -> None:
    for name in _ITEMS & schema.keys():
        _check_number(name, schema[name], MAX_ITEMS, param)
    for name in _LENGTHS & schema.keys():
        _check_number(name, schema[name], MAX_LENGTH, param)
    if isinstance(choices := schema.get("enum"), list):
        _check_choices(choices, param)
    if isinstance(pattern := schema.get("pattern"), str):
        _check_size(pattern, MAX_REGEX_BYTES, param, "a `pattern`")
        _check_counts(pattern, param)
    if isinstance(patterns := schema.get("patternProperties"), Mapping):
        for pattern in patterns:
            _check_size(pattern, MAX_REGEX_BYTES, param, "a name in `patternProperties`")
            _check_counts(pattern, param)


def _check_number(name: str, value: Any, most: int, param: str) -> None:
    if isinstance(value, int | float) and not value <= most:
        raise _exceeded(param, f"{name} over {most:,}")


def _check_choices(choices: list[Any], param: str) -> None:
    if len(choices) > MAX_CHOICES:
        raise _exceeded(param, f"more than {MAX_CHOICES:,} choices")


def _check_size(text: str, most: int, param: str, what: str) -> None:
    if len(text) > most or len(text.encode(errors="replace")) > most:
        raise _exceeded(param, f"{what} of more than {most:,} bytes")


def _check_counts(pattern: str, param: str) -> None:
    for counts in _COUNTS.finditer(pattern):
        if any(len(count) > 9 or int(count) > MAX_LENGTH for count in counts.groups() if count):
            raise _exceeded(param, f"repetition more than {MAX_LENGTH:,} times")


def _exceeded(param: str, what: str) -> RequestInvalid:
    return RequestInvalid(
        f"{param} is too large for a structured output: {what} is not supported", param
    )
