"""Budgets that tenants share, and the check of JSON on its bytes."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_serve.errors import RateLimited, RequestInvalid, RequestTooLarge
from reft_serve.gateway.http.budget import Budget
from reft_serve.gateway.http.json_check import JSON_DEPTH, JSON_DIGITS, check_json
from reft_serve.gateway.http.streaming import ClientGone

pytestmark = pytest.mark.anyio


def _stays() -> bool:
    return False


async def test_a_tenant_has_its_share_and_others_the_rest() -> None:
    budget = Budget("bytes", 10, 5)
    held = await budget.take("a", 5, _stays)
    with pytest.raises(RateLimited):
        await budget.take("a", 1, _stays)
    with pytest.raises(RequestTooLarge):
        await budget.take("b", 6, _stays)
    other = await budget.take("b", 4, _stays)
    with pytest.raises(RateLimited):
        other.grow(2)
    other.grow(1)
    held.release()
    held.release()
    assert budget.used == 5


async def test_what_does_not_fit_waits_and_tenants_take_turns() -> None:
    budget = Budget("turns", 1, 1, 5.0)
    order: list[str] = []

    async def work(tenant: str) -> None:
        lease = await budget.take(tenant, 1, _stays)
        order.append(tenant)
        await asyncio.sleep(0.01)
        lease.release()

    first = await budget.take("a", 1, _stays)
    waiting = [asyncio.create_task(work(tenant)) for tenant in "aaabb"]
    await asyncio.sleep(0)
    first.release()
    await asyncio.gather(*waiting)
    assert order == ["a", "b", "a", "b", "a"]
    assert budget.used == 0


async def test_a_request_stops_waiting_when_its_time_is_over_or_its_caller_leaves() -> None:
    budget = Budget("bytes", 1, 1, 0.1)
    held = await budget.take("a", 1, _stays)
    with pytest.raises(RateLimited):
        await budget.take("a", 1, _stays)
    with pytest.raises(ClientGone):
        await budget.take("b", 1, lambda: True)
    held.release()
    (await budget.take("b", 1, _stays)).release()
    assert budget.used == 0


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda kept: st.lists(kept) | st.dictionaries(st.text(), kept),
    )
)
def test_sound_json_passes_and_values_are_counted(value: object) -> None:
    content = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    assert check_json(content, 1 << 18) <= len(content)


_TEXT = '[{,\\"' * 40_000


@pytest.mark.parametrize(
    "content",
    [json.dumps({"a": _TEXT}), json.dumps({"a": "1" * 100_000}), json.dumps(["\\" * 70_001])],
)
def test_what_is_inside_texts_does_not_count(content: str) -> None:
    assert check_json(content.encode(), 100) <= 3


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"[" * (JSON_DEPTH + 1) + b"]" * (JSON_DEPTH + 1), "deep"),
        (b"[0," + b'{"a":' * JSON_DEPTH + b"0" + b"}" * JSON_DEPTH + b"]", "deep"),
        (b"[" + b"0," * 101 + b"0]", "values"), (b"[" + b'"",' * 100_000 + b"0]", "values"),
        (b"[" + b"[]," * 70_000 + b"0]", "lists and objects"), (b"[1" + b"0" * JSON_DIGITS + b"]", "digits"),
        ("[0]".encode("utf-16"), "UTF-8"),
    ],
)  # fmt: skip
def test_what_is_too_much_is_refused(content: bytes, phrase: str) -> None:
    with pytest.raises(RequestInvalid, match=phrase):
        check_json(content, 100 if phrase == "values" else 1 << 18)


def test_the_deepest_that_is_taken_is_taken() -> None:
    assert check_json(b"[" * JSON_DEPTH + b"]" * JSON_DEPTH, 1000) == JSON_DEPTH
