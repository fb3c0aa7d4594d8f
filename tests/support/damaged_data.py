"""Damaged data files, each with the sentences that it must be refused with. Rows written for these tests."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st

from reft_serve.datafiles.formats import check_rows
from reft_serve.datafiles.lines import FileLimits
from reft_serve.errors import DataInvalid


def user(content: Any = "Which animal barks?") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "The dog.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages or (user(), assistant())), **more}


def pair(**changes: Any) -> dict[str, Any]:
    return {
        "input": {"messages": [user()], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [assistant()],
        "non_preferred_output": [assistant("The cat.")],
    } | changes


def completion(**changes: Any) -> dict[str, Any]:
    return {"prompt": "A dog says", "completion": " woof."} | changes


def lines(*rows: Any) -> bytes:
    """JSONL; bytes stand for themselves."""
    return (
        b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
        + b"\n"
    )


@dataclass(frozen=True)
class Damaged:
    name: str
    data: bytes
    faults: tuple[str, ...]
    limits: FileLimits = field(default_factory=FileLimits)


GOOD = chat()


def _row(name: str, row: Any, *faults: str) -> Damaged:
    """A file whose third line is damaged."""
    return Damaged(
        name, lines(GOOD, GOOD, row, GOOD), tuple(f"line 3: {fault}" for fault in faults)
    )


def _pair(name: str, fault: str, **changes: Any) -> Damaged:
    return Damaged(name, lines(pair(), pair(**changes)), (f"line 2: {fault}",))


TOOL = {"type": "function", "function": {"name": "open_hours", "parameters": {"type": "object"}}}


def call(number: int = 1, arguments: str = '{"day": "Monday"}') -> dict[str, Any]:
    return {
        "id": f"call_{number}",
        "type": "function",
        "function": {"name": "open_hours", "arguments": arguments},
    }


def tool(call_id: str, content: str = "9 to 5") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def deep_tool(depth: int) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    for _ in range(depth):
        parameters = {"properties": parameters}
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


DAMAGED = [
    # The file
    Damaged("empty file", b"", ("the file has no rows",)),
    Damaged("empty list", b"[]\n", ("the file has no rows",)),
    Damaged("byte-order mark", b"\xef\xbb\xbf" + lines(GOOD),
            ("line 1: begins with a byte-order mark: save the file as UTF-8 without one",)),
    Damaged("UTF-16", lines(GOOD).decode().encode("utf-16"),
            ("line 1: begins with the byte-order mark of UTF-16: save the file as UTF-8",)),
    Damaged("UTF-16 without a mark", lines(GOOD).decode().encode("utf-16-le"),
            ("line 1: holds NUL bytes: save the file as UTF-8 text", "line 2: holds NUL bytes: save the file as UTF-8 text")),
    Damaged("gzip", b"\x1f\x8b\x08\x00" + b"\x01" * 50, ("line 1: is compressed by gzip: unpack the file first",)),
    Damaged("Excel", b"PK\x03\x04" + b"\x01" * 50,
            ("line 1: begins a ZIP archive or an Excel sheet: unpack it, or export it as JSONL",)),
    Damaged("Parquet", b"PAR1" + b"\x01" * 50, ("line 1: begins a Parquet file: export it as JSONL",)),
    Damaged("huge file", lines(GOOD, GOOD), ("the file has more than 100 bytes, which is the limit",),
            FileLimits(file_bytes=100)),
    Damaged("huge list", json.dumps([GOOD, GOOD]).encode(), ("the file has more than 100 bytes, which is the limit",),
            FileLimits(file_bytes=100)),
    Damaged("too many rows", lines(GOOD, GOOD, GOOD), ("the file has more than 2 rows, which is the limit",),
            FileLimits(max_rows=2)),
    Damaged("too few rows", lines(GOOD, GOOD), ("the file has 2 rows: at least 10 are needed",), FileLimits(min_rows=10)),
    # A line
    _row("not JSON", b"{'messages': []}",
         "is not JSON: Expecting property name enclosed in double quotes at column 2"),
    _row("CSV", b"question,answer", "is not JSON: Expecting value at column 1"),
    Damaged("truncated last line", lines(GOOD, GOOD)[:-20],
            ("line 2: ends in the middle of a JSON value: the file seems to be cut off",)),
    Damaged("truncated list", b"[\n" + json.dumps(GOOD).encode() + b",\n" + json.dumps(GOOD).encode()[:-5],
            ("line 3: ends in the middle of a JSON value: the file seems to be cut off",)),
    Damaged("list without its end", b"[\n" + json.dumps(GOOD).encode() + b"\n",
            ("line 3: the list has no ] at its end: the file seems to be cut off",)),
    Damaged("list and more", b"[" + json.dumps(GOOD).encode() + b"]\n" + lines(GOOD),
            ("line 2: has something after the end of the list",)),
    Damaged("list without commas", b"[" + json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode() + b"]",
            ("line 2: is not JSON: expecting , or ] after an element of the list",)),
    Damaged("a row over several lines", lines(GOOD) + b'{\n"messages":\n[]}\n',
            ("line 2: ends in the middle of a JSON value: each line must hold a whole one",
             "line 3: holds more than one JSON value: a second begins at column 11",
             "line 4: holds more than one JSON value: a second begins at column 3")),
    _row("two values on a line", b'{"messages": []} {"messages": []}',
         "holds more than one JSON value: a second begins at column 18"),
    _row("not UTF-8", json.dumps(chat(user("caf?"), assistant())).encode().replace(b"caf?", b"caf\xe9"),
         "is not UTF-8: byte 0xe9 at column 47"),
    _row("NUL bytes", b'{"messages": "\0"}', "holds NUL bytes: save the file as UTF-8 text"),
    _row("empty line", b"", "is empty"),
    _row("line of spaces", b"  \t ", "is empty"),
    Damaged("huge line", lines(GOOD, chat(user("x" * 300), assistant()), GOOD),
            ("line 2: has more than 200 bytes, which is the limit",), FileLimits(row_bytes=200)),
    Damaged("huge row of a list", b"[\n" + lines(chat(user("x" * 300), assistant())) + b"]",
            ("line 2: has a row of more than 200 bytes, which is the limit",), FileLimits(row_bytes=200)),
    _row("NaN", b'{"messages": NaN}', "holds NaN, which is not a JSON value"),
    _row("infinity", b'{"messages": -Infinity}', "holds -Infinity, which is not a JSON value"),
    _row("a bomb of brackets", b'{"messages": ' + b"[" * 100_000, "is nested too deeply"),
    _row("a bomb of objects", b'{"a":' * 100_000, "is nested too deeply"),
    _row("a bomb of digits", b'{"messages": ' + b"9" * 100_000 + b"}", "holds a number of thousands of digits"),
    _row("duplicate keys", b'{"messages": [], "id": 1, "id": 2}', "has the key 'id' twice in one object"),
    _row("half a character", b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
         r"messages[0].content holds half of a surrogate pair ('\ud83d'), which is not a character"),
    # A row
    _row("a number", 3, "is a number, not an object"),
    _row("a list", [GOOD], "is a list, not an object"),
    _row("null", None, "is null, not an object"),
    _row("no keys", {}, "has an unknown format: it has no keys"),
    _row("unknown keys", {"question": "?", "answer": "!"}, "has an unknown format: its keys are 'question', 'answer'"),
    _row("mixed formats", completion(), "is a completion row in a file of chat rows"),
    Damaged("several faults", lines(GOOD, chat(user(""), assistant(3)), b"?", GOOD, chat(user())),
            ("line 2: messages[0].content is empty", "line 2: messages[1].content must be text, not a number",
             "line 3: is not JSON: Expecting value at column 1",
             "line 5: messages has no assistant turn, so there is nothing to learn")),
    # A chat
    _row("messages of a wrong type", {"messages": "hello"}, "messages must be a list, not text"),
    _row("no messages", {"messages": []}, "messages is empty"),
    _row("a message of a wrong type", chat(user(), "hello"), "messages[1] must be an object, not text"),
    _row("no role", chat({"content": "hi"}, assistant()), 'messages[0] has no "role"'),
    _row("no content", chat({"role": "user"}, assistant()), 'messages[0] has no "content"'),
    _row("unknown role", chat({"role": "bot", "content": "hi"}, assistant()),
         "messages[0].role must be 'system', 'developer', 'user', 'assistant' or 'tool', not 'bot'"),
    _row("role of a wrong type", chat({"role": 3, "content": "hi"}, assistant()),
         "messages[0].role must be 'system', 'developer', 'user', 'assistant' or 'tool', not 3"),
    _row("a tool's turn without its call", chat(user(), tool("call_1"), assistant()),
         "messages answers in turn 1 a tool call that the assistant's last turn before it did not make"),
    _row("a tool's turn without an id", chat(user(), {"role": "tool", "content": "4"}, assistant()),
         'messages[1] has no "tool_call_id", but its role is tool'),
    _row("empty content", chat(user(" \n"), assistant()), "messages[0].content is empty"),
    _row("null content", chat(user(), assistant(None)), 'messages[1] has no "content"'),
    _row("content in other parts", chat(user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant()),
         'messages[0].content holds a part 0 that is not {"type": "text", "text": "..."}: only text can be trained on'),
    _row("too many turns", chat(*[user()] * 2049), "has 2,049 messages: at most 2,048 are allowed"),
    _row("no assistant turn", chat(user()), "messages has no assistant turn, so there is nothing to learn"),
    _row("last turn not the assistant's", chat(user(), assistant(), user()),
         "messages ends with a user turn: the last turn must be the assistant's"),
    _row("answer to nothing", chat(assistant()),
         "messages begins with an assistant turn, which answers nothing: give it weight 0"),
    _row("all weights 0", chat(user(), assistant(weight=0)),
         "messages has no assistant turn of weight 1, so there is nothing to learn"),
    _row("weight out of range", chat(user(), assistant(weight=2)), "messages[1].weight must be 0 or 1, not 2"),
    _row("weight in between", chat(user(), assistant(weight=0.5)), "messages[1].weight must be 0 or 1, not 0.5"),
    _row("weight of a wrong type", chat(user(), assistant(weight=True)),
         "messages[1].weight must be a number, not true or false"),
    _row("weight of a user", chat(user() | {"weight": 1}, assistant()),
         "messages[0] has a weight, but its role is user: only assistant turns are learnt"),
    _row("misspelt key", chat(user(), assistant(wieght=1)), "messages[1] has an unknown key 'wieght'"),
    _row("a tool call without its function", chat(user(), assistant(tool_calls=[{"id": "a"}])),
         'messages[1].tool_calls[0] has no "function"'),
    _row("arguments that are no JSON", chat(user(), assistant(tool_calls=[call(arguments="day=Monday")])),
         "messages[1].tool_calls[0].function.arguments is not JSON"),
    _row("arguments that are a list", chat(user(), assistant(tool_calls=[call(arguments="[]")])),
         "messages[1].tool_calls[0].function.arguments is the JSON of a list, not of an object"),
    _row("tool calls of a user", chat(user() | {"tool_calls": [call()]}, assistant()),
         "messages[0] has tool calls, but its role is user: only the assistant calls tools"),
    _row("a refusal", chat(user(), assistant(refusal="No.")),
         "messages[1].refusal is not supported: it cannot be trained on"),
    _row("a tool without its function", chat(tools=[{"type": "function"}]), 'tools[0] has no "function"'),
    _row("another kind of tool", chat(tools=[{"type": "web_search", "function": {"name": "f"}}]),
         "tools[0].type must be 'function', not 'web_search'"),
    _row("too many tools", chat(tools=[TOOL] * 129), "has 129 tools: at most 128 are allowed"),
    _row("parameters that are too deep", chat(tools=[deep_tool(40)]),
         "tools[0].function.parameters is nested more than 32 levels deep"),
    _row("parameters of a wrong type", chat(functions=[{"name": "f", "parameters": []}]),
         "tools[0].function.parameters must be an object, not a list"),
    # The other formats
    Damaged("no completion", lines(completion(), {"prompt": "A dog says"}), ('line 2: has no "completion"',)),
    Damaged("empty completion", lines(completion(), completion(completion="")), ("line 2: completion is empty",)),
    Damaged("prompt of a wrong type", lines(completion(), completion(prompt=["a"])),
            ("line 2: prompt must be text, not a list",)),
    _pair("equal outputs", "preferred_output and non_preferred_output are equal, so there is nothing to prefer",
          non_preferred_output=[assistant()]),
    _pair("no output", "non_preferred_output is empty", non_preferred_output=[]),
    _pair("two turns of output", "preferred_output has 2 turns: it must have one",
          preferred_output=[assistant(), assistant()]),
    _pair("output of a user", "preferred_output has a user turn: it must be the assistant's", preferred_output=[user()]),
    _pair("question with its answer", "input.messages ends with an assistant turn: the answers belong in the two outputs",
          input={"messages": [user(), assistant()]}),
    _pair("preference with tools", 'input.tools[0] has no "function"',
          input={"messages": [user()], "tools": [{"type": "function"}]}),
    Damaged("preference without input", lines(pair(), {k: v for k, v in pair().items() if k != "input"}),
            ('line 2: has no "input"',)),
    Damaged("instruction without an answer", lines({"instruction": "Bark.", "input": "", "output": ""}),
            ('line 1: has neither an "output" nor an "answer", so there is nothing to learn',)),
    Damaged("number for an answer", lines({"instruction": "1 + 1", "answer": 2}),
            ("line 1: answer must be text, not a number",)),
    Damaged("no label", lines({"sentence": "A dog barks."}), ('line 1: has no "label"',)),
    Damaged("label of a test row", lines({"sentence": "A dog barks.", "label": -1}),
            ("line 1: label is -1, which marks a test row without a label",)),
    Damaged("label of a wrong type", lines({"sentence": "A dog barks.", "label": "yes"}),
            ("line 1: label must be a number, not text",)),
    Damaged("label without end", lines(b'{"sentence": "A dog barks.", "label": 1e999}'),
            ("line 1: label is too large a number",)),
    Damaged("one sentence of two", lines({"premise": "A dog barks.", "label": 0}),
            ("line 1: has the sentences premise, which no task of GLUE has",)),
]  # fmt: skip


def faults_of(data: bytes, limits: FileLimits | None = None) -> tuple[str, ...]:
    with pytest.raises(DataInvalid) as caught:
        check_rows(io.BytesIO(data), "data.jsonl", limits)
    return caught.value.faults


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["messages", "role", "content", "weight", "prompt", "completion", "input", "preferred_output",
                         "non_preferred_output", "instruction", "output", "answer", "sentence", "sentence1", "premise",
                         "label", "tools", "name"]) | st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip
