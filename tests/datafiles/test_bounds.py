"""What a data file may cost: time in proportion to its bytes, the memory of a few rows, a bounded report."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_serve.datafiles.formats import check_rows
from reft_serve.datafiles.json_list import ListReader
from reft_serve.datafiles.json_text import Broken
from reft_serve.datafiles.lines import FileLimits
from reft_serve.errors import DataInvalid
from tests.support.damaged_data import VALUES, assistant, chat, faults_of, user

COSTLY = {
    "a row of many keys, one twice": b"{" + b"".join(b'"k%d":1,' % i for i in range(60_000)) + b'"k59999":1}',
    "many objects with a key twice": b'{"messages":[' + b'{"a":1,"a":2},' * 50_000 + b"1]}",
    "many messages of nothing": b'{"messages":[' + b"{}," * 100_000 + b"{}]}",
    "a turn of many unknown keys": json.dumps(chat(user() | {f"k{i}": 1 for i in range(60_000)}, assistant())).encode(),
    "many tool calls of nothing": b'{"messages":[' + b'{"role":"assistant","tool_calls":[' + b"{}," * 100_000 + b"{}]}]}",
    "many text parts": b'{"messages":[{"role":"user","content":[' + b'{"type":"text","text":""},' * 50_000 + b"1]}]}",
    "many tools of nothing": b'{"messages":[],"tools":[' + b"{}," * 100_000 + b"{}]}",
    "numbers of thousands of digits": b'{"prompt":"a","completion":"b","n":[1' + (b"," + b"9" * 4000) * 250 + b"]}",
    "many short lines that are no JSON": b"x\n" * 50_000,
    "a list of many objects without end": b"[" + b"{}," * 100_000,
    "a list of one row without end": b'[{"prompt":"' + b"x" * 3_000_000,
    "a list in brackets": b"[" * 500_000,
    "a list of white space": b"[" + b"\n " * 1_000_000,
}  # fmt: skip
SOUND_BUT_COSTLY = {"numbers of thousands of digits"}


@pytest.mark.parametrize("case", COSTLY)
def test_a_costly_file_takes_time_in_proportion_to_its_bytes_and_gets_a_short_report(
    case: str,
) -> None:
    started = time.process_time()
    try:
        faults: tuple[str, ...] = ()
        check_rows(io.BytesIO(COSTLY[case]), "data.jsonl")
    except DataInvalid as exc:
        faults, message = exc.faults, str(exc)
    assert time.process_time() - started < 10  # what is quadratic takes minutes
    assert bool(faults) == (case not in SOUND_BUT_COSTLY)
    if faults:
        assert len(faults) <= 1001
        assert max(map(len, faults)) < 500
        assert len(message) < 6000


def test_a_large_list_is_checked_in_the_memory_of_a_few_rows() -> None:
    script = (
        "import tempfile, tracemalloc\n"
        "from reft_serve.datafiles.formats import check_rows\n"
        'row = b\'{"prompt": "\' + b\'x\' * 1000 + b\'", "completion": "y"}\'\n'
        "with tempfile.TemporaryFile() as file:\n"
        "    file.write(b'[' + row)\n"
        "    for _ in range(20_000 - 1): file.write(b',\\n' + row)\n"
        "    file.write(b']')\n"
        "    file.seek(0)\n"
        "    tracemalloc.start()\n"
        "    assert check_rows(file, 'large') == ('completion', 20_000)\n"
        "    print(tracemalloc.get_traced_memory()[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 4_000_000  # of a file of 20 MB


def test_a_row_of_a_list_that_never_ends_is_refused_by_its_size() -> None:
    rows = b'[\n{"prompt": "a", "completion": "b"},\n{"prompt": "' + b"x" * 3_000_000
    limits = FileLimits(row_bytes=1 << 20)
    assert faults_of(rows, limits) == (
        "line 3: has a row of more than 1,048,576 bytes, which is the limit",
    )


@pytest.mark.parametrize("end", [b"", b"]"])
def test_a_fault_far_into_a_list_has_its_line_and_column(end: bytes) -> None:
    row = b'{"prompt": "\xc3\xa4", "completion": "b"}'
    rows = b"[" + b",\n".join([row] * 20_000) + b',\n{"prompt": "\xe4"}' + end
    assert faults_of(rows) == ("line 20001: is not UTF-8: byte 0xe4 at column 13",)
    one_line = b"[" + b", ".join([row] * 20_000) + b", x" + end
    assert faults_of(one_line) == (
        f"line 1: is not JSON: Expecting value at column {2 + 20_000 * (len(row) - 1 + 2)}",
    )


@settings(deadline=None, max_examples=100)
@given(st.lists(VALUES, max_size=5), st.sampled_from([None, 0, 2]), st.integers(1, 9))
def test_a_list_read_in_small_pieces_is_the_list(
    rows: list[object], indent: int | None, chunk: int
) -> None:
    data = (
        json.dumps(rows, indent=indent, allow_nan=False, ensure_ascii=False, default=str)
        if _sound(rows)
        else "[]"
    )
    try:
        content = data.encode()
    except UnicodeEncodeError:
        return
    reader = ListReader(io.BytesIO(content[1:]), content[:1], 1 << 20, 1 << 20, chunk)
    found = list(reader.elements())
    assert [element.value for element in found] == json.loads(data)
    lines = data.split("\n")
    for element in found:
        first = json.dumps(element.value, indent=indent, ensure_ascii=False).split("\n")[0]
        assert first in lines[element.line - 1]


def _sound(rows: list[object]) -> bool:
    try:
        json.dumps(rows, allow_nan=False)
    except ValueError:
        return False
    return True


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60), st.integers(1, 9))
def test_any_bytes_in_small_pieces_are_read_as_in_one(data: bytes, chunk: int) -> None:
    def read(size: int) -> object:
        reader = ListReader(io.BytesIO(data), b"[", 1 << 20, 1 << 20, size)
        try:
            return [element.line for element in reader.elements()]
        except Broken as exc:
            return str(exc), reader.first_line + exc.newlines

    small, whole = read(chunk), read(1 << 20)
    encoding = isinstance(whole, tuple) and ("NUL" in whole[0] or "UTF-8" in whole[0])
    assert (
        small == whole or encoding
    )  # what comes before bytes that are no text may be at fault first
