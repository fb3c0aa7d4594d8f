"""Rows of a step, and the keys of the blocks that hold them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reft_serve.engine.adapter_ref import AdapterRef
from reft_serve.engine.core.prefix_cache import edited_in
from reft_serve.engine.worker.rows import StepRequest, rows_of
from reft_serve.interventions.positions import Part, PositionRule
from tests.support.engine.position_rules import RULES


def edited(rule: PositionRule, prompt_len: int, length: int) -> set[tuple[int, int]]:
    """Edited tokens and their parts, straight from the rule."""
    prefix, suffix = rule.indices(prompt_len) if rule.phase != "generated" else ([], [])
    later = range(prompt_len, length) if rule.edits_generated else range(0)
    return {(i, Part.PREFIX) for i in [*prefix, *later]} | {(i, Part.SUFFIX) for i in suffix}


@given(
    rule=RULES,
    prompt_len=st.integers(1, 60),
    generated=st.integers(0, 10),
    chunk=st.integers(1, 25),
    first=st.integers(0, 9),
)
def test_chunks_of_any_size_edit_the_same_tokens(
    rule: PositionRule, prompt_len: int, generated: int, chunk: int, first: int
) -> None:
    length, seen = prompt_len + generated, set()
    for computed in range(0, length, chunk):
        scheduled = min(chunk, length - computed)
        request = StepRequest(
            AdapterRef("0" * 64, rule), "", prompt_len, computed, scheduled, first
        )
        rows = rows_of([request], lambda _: 3)
        if rows is not None:
            assert rows.row_T.min() >= first
            assert rows.row_T.max() < first + scheduled
            seen |= {
                (int(row) - first + computed, int(key) - 6)
                for row, key in zip(rows.row_T, rows.key_T, strict=True)
            }
    assert seen == edited(rule, prompt_len, length)


@given(
    rule=RULES, prompt_len=st.integers(1, 60), answer=st.integers(0, 20), chunk=st.integers(1, 25)
)
def test_a_named_end_of_the_prompt_edits_what_a_prompt_of_that_length_would_be_edited(
    rule: PositionRule, prompt_len: int, answer: int, chunk: int
) -> None:
    length, identity, seen = (
        prompt_len + answer,
        AdapterRef("0" * 64, rule, prompt_tokens=prompt_len),
        set(),
    )
    for computed in range(0, length, chunk):
        rows = rows_of(
            [StepRequest(identity, "", length, computed, min(chunk, length - computed), 0)],
            lambda _: 3,
        )
        if rows is not None:
            seen |= {
                (int(row) + computed, int(key) - 6)
                for row, key in zip(rows.row_T, rows.key_T, strict=True)
            }
    assert seen == edited(rule, prompt_len, length)


def test_a_step_without_edits_asks_for_no_slot() -> None:
    request = StepRequest(AdapterRef("0" * 64, PositionRule("f2")), "", 10, 5, 5, 0)
    assert rows_of([request], lambda _: 1 // 0) is None


@given(
    rule=RULES,
    lengths=st.lists(st.integers(1, 80), min_size=2, max_size=2),
    block=st.sampled_from([4, 16]),
)
def test_blocks_share_a_key_exactly_when_their_edits_agree_up_to_their_end(
    rule: PositionRule, lengths: list[int], block: int
) -> None:
    total = 96

    def chain(prompt_len: int) -> list[tuple[object, ...]]:
        keys = [
            edited_in(AdapterRef("0" * 64, rule), prompt_len, start, start + block)
            for start in range(0, total, block)
        ]
        return [tuple(keys[: i + 1]) for i in range(len(keys))]

    for i, (mine, other) in enumerate(zip(chain(lengths[0]), chain(lengths[1]), strict=True)):
        end = (i + 1) * block
        now = [{e for e in edited(rule, n, total) if e[0] < end} for n in lengths]
        assert (mine == other) == (now[0] == now[1])


def test_blocks_before_the_first_edit_have_no_key() -> None:
    rule = AdapterRef("0" * 64, PositionRule("l5"))
    assert edited_in(rule, 100, 0, 64) == ()
    assert edited_in(rule, 100, 80, 96) == ((95, 96, Part.PREFIX),)
    assert edited_in(rule, 100, 96, 112) == ((96, 100, Part.PREFIX),)
    assert edited_in(rule, 100, 112, 128) == ()
