"""An engine's answer made the caller's: names, usage, ends and failures of a stream, without a
server.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_serve.errors import EngineUnavailable
from reft_serve.gateway.engines.tokens import Tokens
from reft_serve.gateway.inference.rewriting import Rewriter, rewrite_whole, sse_error

ENGINES_NAME, PUBLIC = "reft-v-0123", 'acme/"birds"@1'
DONE = b"data: [DONE]\n\n"


def event(**body: Any) -> bytes:
    """As vLLM writes it: no spaces, non-ASCII as it is."""
    return (
        b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
    )


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def chunk(text: str, completion: int, index: int = 0) -> bytes:
    choice = {"index": index, "text": text, "finish_reason": None}
    return event(id="cmpl-1", model=ENGINES_NAME, choices=[choice], usage=usage(7, completion, 3))


def last(completion: int) -> bytes:
    return event(id="cmpl-1", model=ENGINES_NAME, choices=[], usage=usage(7, completion, 3))


def parsed(stream: bytes) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix(b"data: ")) for line in stream.split(b"\n\n") if line]


STREAM = chunk("one", 1) + chunk("deux é", 2) + last(2) + DONE


@pytest.mark.parametrize("wants_usage", [True, False])
def test_a_stream_has_the_public_name_and_usage_only_if_asked(wants_usage: bool) -> None:
    rewriter = Rewriter(ENGINES_NAME, PUBLIC, wants_usage)
    events = parsed(rewriter.feed(STREAM))
    assert {each["model"] for each in events} == {PUBLIC}
    assert [each["choices"][0]["text"] for each in events[:2]] == ["one", "deux é"]
    assert [each.get("usage") for each in events] == [None, None, usage(7, 2, 3)][
        : 3 if wants_usage else 2
    ]
    assert rewriter.complete
    assert rewriter.ending == DONE
    assert rewriter.tokens == Tokens(7, 3, 2)


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_where_the_network_cuts_a_stream_changes_nothing(cuts: list[int]) -> None:
    whole, pieces = Rewriter(ENGINES_NAME, PUBLIC, True), Rewriter(ENGINES_NAME, PUBLIC, True)
    ends = sorted({0, *cuts, len(STREAM)})
    told = [pieces.feed(STREAM[a:b]) for a, b in pairwise(ends)]
    assert b"".join(told) == whole.feed(STREAM)
    assert all(each.endswith(b"\n\n") for each in told if each)
    assert (pieces.ending, pieces.tokens) == (whole.ending, whole.tokens)


def test_text_that_looks_like_structure_stays_text() -> None:
    text = (
        f'"model":"{ENGINES_NAME}" ,"usage":{{"prompt_tokens":9}} "finish_reason":"abort" data: '
        "[DONE]"
    )
    rewriter = Rewriter(ENGINES_NAME, PUBLIC, False)
    (only,) = parsed(rewriter.feed(chunk(text, 1)))
    assert only["choices"][0]["text"] == text
    assert only["model"] == PUBLIC
    assert rewriter.error is None
    assert not rewriter.complete
    assert (
        parsed(rewrite_whole(chunk(text, 1)[6:-2], ENGINES_NAME, PUBLIC)[0])[0]["choices"][0][
            "text"
        ]
        == text
    )


def test_a_stream_that_breaks_off_has_the_tokens_of_each_choices_latest_chunk() -> None:
    rewriter = Rewriter(ENGINES_NAME, PUBLIC, False)
    rewriter.feed(chunk("a", 1, 0) + chunk("b", 1, 1) + chunk("c", 2, 0) + chunk("d", 5, 1)[:-1])
    assert not rewriter.complete
    assert rewriter.tokens == Tokens(7, 3, 2 + 1)
    assert Rewriter(ENGINES_NAME, PUBLIC, False).tokens == Tokens()


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (event(error={"message": "no", "code": 400}), {"message": "no", "code": 400}),
        (chunk("x", 1).replace(b'"finish_reason":null', b'"finish_reason":"abort"'), None),
    ],
    ids=["its own error", "told to end"],
)
def test_a_failure_of_the_engine_is_kept_back(broken: bytes, error: dict[str, Any] | None) -> None:
    rewriter = Rewriter(ENGINES_NAME, PUBLIC, True)
    assert len(parsed(rewriter.feed(chunk("a", 1) + broken))) == 1
    assert rewriter.error is not None
    if error is None:
        assert rewriter.error["code"] == 503
    else:
        assert rewriter.error == error


def typed(name: str, **body: Any) -> bytes:
    return b"event: " + name.encode() + b"\n" + event(type=name, **body)


@pytest.mark.parametrize(
    ("status", "name"), [("completed", "completed"), ("incomplete", "incomplete")]
)
def test_a_responses_stream_ends_with_its_status(status: str, name: str) -> None:
    """VLLM names the last event `completed` in both cases."""
    rewriter = Rewriter(ENGINES_NAME, PUBLIC, True)
    given_back = rewriter.feed(
        typed("response.created", response={"model": ENGINES_NAME})
        + typed("response.output_text.delta", delta="a")
        + typed("response.output_text.delta", delta="b")
    )
    assert given_back.count(b"event: ") == 3
    assert ENGINES_NAME.encode() not in given_back
    assert rewriter.tokens == Tokens(0, 0, 2)
    used = {"input_tokens": 4, "output_tokens": 9, "input_tokens_details": {"cached_tokens": 1}}
    response = {"model": ENGINES_NAME, "status": status, "usage": used}
    assert rewriter.feed(typed("response.completed", response=response)) == b""
    assert rewriter.complete
    head, _, body = rewriter.ending.partition(b"\n")
    assert head == f"event: response.{name}".encode()
    assert parsed(body)[0]["type"] == f"response.{name}"
    assert rewriter.tokens == Tokens(4, 1, 9)


def test_a_whole_answer_is_renamed_and_counted() -> None:
    answer = {
        "model": ENGINES_NAME,
        "choices": [{"finish_reason": "stop"}],
        "usage": usage(5, 6, 2),
    }
    content, tokens = rewrite_whole(
        json.dumps(answer, separators=(",", ":")).encode(), ENGINES_NAME, PUBLIC
    )
    assert json.loads(content) == answer | {"model": PUBLIC}
    assert tokens == Tokens(5, 2, 6)
    assert tokens.work == 5 - 2 + 6


def test_a_whole_answer_that_the_engine_gave_up_is_none() -> None:
    with pytest.raises(EngineUnavailable):
        rewrite_whole(
            chunk("x", 1)[6:-2].replace(b'"finish_reason":null', b'"finish_reason":"abort"'),
            ENGINES_NAME,
            "b",
        )


@pytest.mark.parametrize(
    ("told", "tokens"),
    [
        (None, Tokens()),
        ({}, Tokens()),
        ({"prompt_tokens": 3, "total_tokens": 3, "completion_tokens": None}, Tokens(3)),
        ({"prompt_tokens": 3, "prompt_tokens_details": None, "cached_tokens": 2}, Tokens(3, 2)),
        ({"input_tokens": 3, "output_tokens": 4}, Tokens(3, 0, 4)),
    ],
)
def test_usage_is_read_from_each_of_openais_shapes(
    told: dict[str, Any] | None, tokens: Tokens
) -> None:
    assert Tokens.of(told) == tokens


def test_a_failure_in_a_stream_has_the_shape_of_its_route() -> None:
    body = {"error": {"message": "no", "code": "x"}}
    assert parsed(sse_error(body, typed=False)) == [body]
    head, _, data = sse_error(body, typed=True).partition(b"\n")
    assert head == b"event: error"
    assert parsed(data) == [{"type": "error", "message": "no", "code": "x", "error": body["error"]}]
