"""`positions`: pyreft's rules to the token, and the properties that serving leans on."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_serve.errors import PositionsInvalid
from reft_serve.interventions.positions import Part, Phase, PositionRule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "positions.json").read_text())
ROWS = GOLDEN["get_intervention_locations"]

lengths = st.integers(0, 300)


@st.composite
def rules(
    draw: st.DrawFn, phases: tuple[Phase, ...] = ("prompt", "all", "generated")
) -> PositionRule:
    first, last = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    indices = draw(st.lists(st.integers(-60, 60), min_size=1, max_size=8))
    spec = draw(
        st.sampled_from(
            [
                f"f{first + 1}",
                f"l{last + 1}",
                f"f{first + 1}+l{last + 1}",
                "first",
                "last",
                "all",
                ",".join(map(str, indices)),
            ]
        )
    )
    phase = draw(st.sampled_from(phases))
    tied = "+" not in spec or phase != "prompt" or draw(st.booleans())
    offset = 0 if spec == "all" else draw(st.integers(0, 3))
    return PositionRule(spec, tied, offset, phase)


def edited(rule: PositionRule, prompt_len: int, start: int, stop: int) -> list[int]:
    """What an engine edits of a chunk of tokens."""
    return [
        i
        for span in rule.spans(prompt_len)
        for i in range(max(span.start, start), min(span.stop, stop))
    ]


def untiable(spec: str) -> bool:
    return "+" in spec and "0" not in spec


@pytest.mark.parametrize(
    "row",
    ROWS,
    ids=lambda r: f"{r['positions']}-{r['share_weights']}-{r['last_position']}-{r['pad_mode']}",
)
def test_the_edited_tokens_are_pyrefts(row: dict[str, Any]) -> None:
    length = row["last_position"]
    pad = -1 if row["pad_mode"] == "first" else length
    theirs = [[i for i in locations if i != pad] for locations in row["locations"]]
    tied = row["share_weights"] or not untiable(row["positions"])
    prefix, suffix = PositionRule(row["positions"], tied).indices(length)
    assert theirs == ([prefix, prefix] if tied else [prefix, suffix])


def test_the_golden_rows_cover_untied_rules_and_both_paddings() -> None:
    assert {row["pad_mode"] for row in ROWS} == {"first", "last"}
    assert any(not row["share_weights"] and untiable(row["positions"]) for row in ROWS)


@pytest.mark.parametrize("spec", ["l2+f2", "F1", "f1+l1+f2", "f7 +l7", ""])
def test_what_pyreft_misreads_in_silence_or_trips_over_is_refused(spec: str) -> None:
    assert spec in GOLDEN["parse_positions_odd_inputs"]
    with pytest.raises(PositionsInvalid, match="not understood"):
        PositionRule(spec)


def test_a_bare_number_is_an_index_where_pyreft_reads_no_token_at_all() -> None:
    assert GOLDEN["parse_positions_odd_inputs"]["7"] == [0, 0]
    assert PositionRule("7").indices(10) == ([7], [])
    assert PositionRule("7").indices(7) == ([], [])


@pytest.mark.parametrize(
    ("spec", "indices"), [("first", [0]), ("last", [9]), ("all", list(range(10)))]
)
def test_words_that_pyreft_knows_in_code_only_have_a_spelling(
    spec: str, indices: list[int]
) -> None:
    assert "ValueError" in GOLDEN["parse_positions_odd_inputs"][spec]
    assert PositionRule(spec).indices(10) == (indices, [])


@given(rules(), lengths)
def test_spans_ascend_and_never_meet(rule: PositionRule, length: int) -> None:
    spans = rule.spans(length)
    assert all(0 <= span.start < span.stop for span in spans)
    assert all(a.stop <= b.start for a, b in pairwise(spans))


@given(rules(phases=("prompt",)), lengths)
def test_a_prompt_rule_stays_inside_the_prompt(rule: PositionRule, length: int) -> None:
    assert all(span.stop <= length for span in rule.spans(length))


@given(rules(), lengths)
def test_indices_are_the_prompt_part_of_the_spans(rule: PositionRule, length: int) -> None:
    prefix, suffix = rule.indices(length)
    if rule.phase != "generated":
        assert sorted(prefix + suffix) == edited(rule, length, 0, length)
    assert not (rule.tied and suffix)
    assert not set(prefix) & set(suffix)


@given(rules(), lengths, st.lists(st.integers(0, 400), max_size=12))
def test_any_split_into_chunks_edits_the_same_tokens(
    rule: PositionRule, length: int, cuts: list[int]
) -> None:
    edges = [0, *sorted(cuts), 400]
    chunks = [edited(rule, length, a, b) for a, b in pairwise(edges)]
    assert [i for chunk in chunks for i in chunk] == edited(rule, length, 0, 400)


@given(st.integers(1, 40), st.integers(1, 40), lengths, st.integers(0, 3))
def test_no_half_edits_more_than_half_of_the_prompt(
    first: int, last: int, length: int, offset: int
) -> None:
    usable = max(length - offset, 0)
    prefix, suffix = PositionRule(f"f{first}+l{last}", tied=False, last_offset=offset).indices(
        length
    )
    assert prefix == list(range(min(first, usable // 2)))
    assert suffix == list(range(usable - min(last, usable // 2), usable))
    assert PositionRule(f"f{first}", last_offset=offset).indices(length)[0] == prefix
    assert PositionRule(f"l{last}", last_offset=offset).indices(length)[0] == suffix


@given(st.integers(1, 40), st.integers(1, 40), lengths)
def test_tying_changes_the_part_and_not_the_tokens(first: int, last: int, length: int) -> None:
    tied, untied = (PositionRule(f"f{first}+l{last}", tied=t) for t in (True, False))
    assert edited(tied, length, 0, length) == edited(untied, length, 0, length)
    assert {span.part for span in tied.spans(length)} <= {Part.PREFIX}


@given(rules(phases=("prompt",)).filter(lambda rule: rule.tied), lengths)
def test_a_phase_says_whether_prompt_and_generated_tokens_are_edited(
    rule: PositionRule, length: int
) -> None:
    both = PositionRule(rule.spec, rule.tied, rule.last_offset, "all")
    after = PositionRule(rule.spec, rule.tied, rule.last_offset, "generated")
    generated = list(range(length, length + 50))
    assert edited(both, length, 0, length + 50) == edited(rule, length, 0, length) + generated
    assert edited(after, length, 0, length + 50) == generated
    assert not rule.edits_generated
    assert both.edits_generated
    assert after.edits_generated


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ({"spec": "f0+l0"}, "name no token"),
        ({"spec": "f3", "tied": False}, "cannot be untied"),
        ({"spec": "f3+l0", "tied": False}, "cannot be untied"),
        ({"spec": "f3", "last_offset": -1}, "between 0 and 1024"),
        ({"spec": "all", "last_offset": 1}, "no meaning"),
        ({"spec": "f3", "phase": "decode"}, "phase must be"),
        ({"spec": "f3+l3", "tied": False, "phase": "all"}, "needs tied"),
        ({"spec": ",".join(["1"] * 4097)}, "at most 4096"),
        ({"spec": "f\u0663"}, "not understood"),
        ({"spec": "f1+"}, "not understood"),
        ({"spec": "f1l1"}, "not understood"),
        ({"spec": "1,,2"}, "not understood"),
    ],
)
def test_a_rule_that_contradicts_itself_is_refused_with_a_sentence(
    rule: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PositionsInvalid, match=sentence):
        PositionRule(**rule)
