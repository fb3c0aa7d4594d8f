"""Rows as clients export them: what says the same as a plain row is the same row."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from reft_serve.datafiles.formats import Chat, PreferencePair, check_rows
from tests.support.damaged_data import TOOL, assistant, call, chat, lines, pair, tool, user

SDK_MARKS = {
    "refusal": None,
    "annotations": [],
    "audio": None,
    "function_call": None,
    "tool_calls": None,
}
PLAIN = Chat.model_validate(chat())
LEGACY = {"name": "open_hours", "arguments": '{"day": "Monday"}'}


@pytest.mark.parametrize(
    "row",
    [
        chat(user(), assistant() | SDK_MARKS),
        chat(user(), assistant(tool_calls=[], weight=None, name=None, reasoning_content=None, reasoning=None)),
        chat(user([{"type": "text", "text": "Which animal barks?"}]), assistant([{"type": "text", "text": "The dog."}])),
        chat(tools=None, functions=None, parallel_tool_calls=None, prompt=None, instruction=None),
        chat(tools=[], functions=[]),
    ],
    ids=["an SDK's message", "nulls and empty lists", "text parts", "nulls in the row", "no tools"],
)  # fmt: skip
def test_a_row_that_says_the_same_is_the_same(row: dict[str, Any]) -> None:
    assert Chat.model_validate(row) == PLAIN
    assert check_rows(io.BytesIO(lines(row)), "rows.jsonl") == ("chat", 1)


def test_several_text_parts_are_joined_as_the_engine_joins_them() -> None:
    parts = [{"type": "text", "text": "Which animal"}, {"type": "text", "text": "barks?"}]
    assert (
        Chat.model_validate(chat(user(parts), assistant())).messages[0].content
        == "Which animal\nbarks?"
    )


def test_a_row_with_tool_calls_keeps_them_in_openais_form() -> None:
    row = chat(user(), assistant(None, tool_calls=[call()]), tool("call_1"), assistant(),
               tools=[TOOL], parallel_tool_calls=False)  # fmt: skip
    del row["messages"][1]["content"]
    found = Chat.model_validate(row)
    kept = json.loads(found.model_dump_json(exclude_none=True))
    assert kept == {"messages": row["messages"], "tools": [TOOL]}
    assert found.learnt == [1, 3]
    assert check_rows(io.BytesIO(lines(row)), "rows.jsonl") == ("chat", 1)


@pytest.mark.parametrize("content", [None, "", []])
def test_a_turn_of_tool_calls_needs_no_content(content: object) -> None:
    found = Chat.model_validate(chat(user(), assistant(content, tool_calls=[call()])))
    assert found.messages[1].content is None


def test_functions_and_function_calls_become_tools_and_tool_calls() -> None:
    legacy = chat(user(), assistant(None, function_call=LEGACY), {"role": "function", "name": "open_hours", "content": "9"},
                  assistant(), functions=[TOOL["function"]])  # fmt: skip
    modern = chat(user(), {"role": "assistant", "tool_calls": [call()]},
                  tool("call_1", "9") | {"name": "open_hours"}, assistant(), tools=[TOOL])  # fmt: skip
    assert Chat.model_validate(legacy) == Chat.model_validate(modern)


@pytest.mark.parametrize("arguments", ["", {}, "{}"])
def test_a_call_without_arguments_has_an_empty_object(arguments: Any) -> None:
    found = Chat.model_validate(
        chat(user(), assistant(None, tool_calls=[call(arguments=arguments)]))
    )
    assert found.messages[1].tool_calls is not None
    assert json.loads(found.messages[1].tool_calls[0].function.arguments) == {}


def test_preference_rows_take_the_same_forms() -> None:
    row = pair(
        input={
            "messages": [user([{"type": "text", "text": "Which animal barks?"}])],
            "tools": None,
        },
        preferred_output=[assistant() | SDK_MARKS],
    )
    assert PreferencePair.model_validate(row) == PreferencePair.model_validate(pair())
    called = pair(input={"messages": [user()], "tools": [TOOL]},
                  preferred_output=[assistant(None, tool_calls=[call()])],
                  non_preferred_output=[assistant(None, tool_calls=[call(arguments="{}")])])  # fmt: skip
    assert check_rows(io.BytesIO(lines(called)), "rows.jsonl") == ("preference", 1)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "A dog says", "completion": " woof.", "messages": None},
        {"instruction": "Bark.", "input": None, "output": "Woof.", "prompt": None},
        {"sentence": "A dog barks.", "premise": None, "label": 1},
    ],
)  # fmt: skip
def test_null_means_not_given_in_rows_of_every_format(row: dict[str, Any]) -> None:
    given = {key: value for key, value in row.items() if value is not None}
    expected = check_rows(io.BytesIO(lines(given)), "rows.jsonl")
    assert check_rows(io.BytesIO(lines(row)), "rows.jsonl") == expected
