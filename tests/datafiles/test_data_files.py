"""Reading a data file: every damaged one gets its sentences with their lines, and every sound one is read as it is meant."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reft_serve.datafiles.formats import Chat, Glue, check_rows, read_rows
from reft_serve.datafiles.lines import FileLimits
from reft_serve.errors import DataInvalid
from tests.support.damaged_data import (
    DAMAGED,
    VALUES,
    Damaged,
    assistant,
    chat,
    completion,
    faults_of,
    lines,
    pair,
    user,
)

GLUE = {"question": "Who barked?", "sentence": "The dog did.", "label": 1, "idx": 4}
SOUND = {
    "chat": lines(chat(), chat({"role": "developer", "content": "Be brief."}, user(), assistant(weight=1)), chat(tools=[])),
    "completion": lines(completion(), completion(id=3)),
    "preference": lines(pair(), pair(input={"messages": [user()]})),
    "instruction": lines({"instruction": "Bark.", "output": "Woof."},
                         {"instruction": "1 + 1?", "answer": "2", "task": "sums"}),
    "glue": lines(GLUE, {"sentence1": "A dog.", "sentence2": "An animal.", "label": 3.5}),
}  # fmt: skip


@pytest.mark.parametrize("damaged", DAMAGED, ids=lambda damaged: damaged.name)
def test_a_damaged_file_gets_its_sentences_with_their_lines(
    damaged: Damaged, tmp_path: Path
) -> None:
    assert faults_of(damaged.data, damaged.limits) == damaged.faults
    path = tmp_path / "data.jsonl"
    path.write_bytes(damaged.data)
    with pytest.raises(DataInvalid) as caught:
        read_rows(path, damaged.limits)
    assert caught.value.faults == damaged.faults
    assert str(caught.value).startswith(f"data file {path} cannot be used: {damaged.faults[0]}")
    assert caught.value.code == "data_invalid"


@pytest.mark.parametrize("format_", SOUND)
def test_a_sound_file_is_counted_and_its_format_told(format_: str) -> None:
    rows = SOUND[format_].count(b"\n")
    assert check_rows(io.BytesIO(SOUND[format_]), "data.jsonl") == (format_, rows)


@pytest.mark.parametrize("format_", SOUND)
def test_a_list_of_rows_is_the_same_file(format_: str, tmp_path: Path) -> None:
    """LLM-Adapters and Alpaca publish one JSON list, indented."""
    as_lines, as_list = tmp_path / "data.jsonl", tmp_path / "data.json"
    as_lines.write_bytes(SOUND[format_])
    as_list.write_text(
        json.dumps([json.loads(line) for line in SOUND[format_].splitlines()], indent=2)
    )
    first, second = read_rows(as_lines), read_rows(as_list)
    assert [row for _, row in first.rows] == [row for _, row in second.rows]
    numbers = [number for number, _ in second.rows]
    assert [as_list.read_text().splitlines()[number - 1] for number in numbers] == ["  {"] * len(
        numbers
    )


def test_line_ends_of_windows_and_a_missing_last_newline_change_nothing(tmp_path: Path) -> None:
    plain, windows = tmp_path / "plain.jsonl", tmp_path / "windows.jsonl"
    plain.write_bytes(SOUND["chat"])
    windows.write_bytes(SOUND["chat"].replace(b"\n", b"\r\n").rstrip())
    assert read_rows(plain).rows == read_rows(windows).rows


def test_the_first_rows_decide_the_format_by_their_number() -> None:
    stray = faults_of(lines(completion(), chat(), chat(), chat()))
    assert stray == ("line 1: is a completion row in a file of chat rows",)


def test_turns_of_weight_0_are_context_only() -> None:
    row = Chat.model_validate(chat(assistant("Hello.", weight=0), user(), assistant(), user(), assistant(weight=0),
                                   user(), assistant(weight=1)))  # fmt: skip
    assert row.learnt == [2, 6]


def test_the_sentences_of_glue_are_told_in_their_order() -> None:
    assert Glue.model_validate(GLUE).texts == ("Who barked?", "The dog did.")
    assert Glue.model_validate({"sentence": "A dog.", "label": 0}).texts == ("A dog.",)
    assert Glue.model_validate({"sentence2": "b", "sentence1": "a", "label": 0}).texts == ("a", "b")


def test_a_long_report_is_cut_with_a_count_and_the_message_tells_the_first_faults() -> None:
    with pytest.raises(DataInvalid) as caught:
        check_rows(io.BytesIO(b"x\n" * 1500), "data.jsonl")
    assert len(caught.value.faults) == 1001
    assert caught.value.faults[-1] == "500 more faults are not listed"
    assert str(caught.value).count("is not JSON") == 10
    assert str(caught.value).endswith("; and 991 more")


def test_a_large_file_is_checked_in_the_memory_of_a_row() -> None:
    script = (
        "import tempfile, tracemalloc\n"
        "from reft_serve.datafiles.formats import check_rows\n"
        'line = b\'{"prompt": "\' + b\'x\' * 1000 + b\'", "completion": "y"}\\n\'\n'
        "with tempfile.TemporaryFile() as file:\n"
        "    for _ in range(20_000): file.write(line)\n"
        "    file.seek(0)\n"
        "    tracemalloc.start()\n"
        "    assert check_rows(file, 'large') == ('completion', 20_000)\n"
        "    print(tracemalloc.get_traced_memory()[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2_000_000  # of a file of 20 MB


def test_files_are_checked_and_recipes_read_without_torch_and_transformers() -> None:
    script = (
        "import io, sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = sys.modules['jinja2'] = None\n"
        "from reft_serve.datafiles.formats import check_rows\n"
        "from reft_serve.recipes.recipe import load_recipe, recipe_names\n"
        "for name in recipe_names(): load_recipe(name)\n"
        'print(check_rows(io.BytesIO(b\'{"prompt": "a", "completion": "b"}\'), \'data.jsonl\'))\n'
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "('completion', 1)"


def _reads(data: bytes) -> None:
    started, faults = time.monotonic(), None
    try:
        format_, count = check_rows(
            io.BytesIO(data), "data.jsonl", FileLimits(file_bytes=1 << 16, row_bytes=1 << 12)
        )
    except DataInvalid as exc:
        faults = exc.faults
        str(exc).encode()  # a sentence that can be sent
    assert faults or (faults is None and count and format_ in SOUND)
    assert time.monotonic() - started < 5


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=500))
@example(b"[")
@example(b"\xef\xbb")
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    _reads(data)


@settings(deadline=None, max_examples=300)
@given(st.lists(VALUES, max_size=5), st.booleans())
def test_any_json_is_read_or_refused(rows: list[object], as_list: bool) -> None:
    _reads(
        json.dumps(rows).encode()
        if as_list
        else b"\n".join(json.dumps(row).encode() for row in rows)
    )


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(SOUND)), st.data())
def test_a_sound_file_with_any_bytes_changed_is_read_or_refused(
    format_: str, data: st.DataObject
) -> None:
    good = SOUND[format_]
    start = data.draw(st.integers(0, len(good)))
    stop = data.draw(st.integers(start, min(len(good), start + 20)))
    _reads(good[:start] + data.draw(st.binary(max_size=20)) + good[stop:])
