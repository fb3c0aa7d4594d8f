"""The paper's sets as they are published, each read once."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from reft_serve.datafiles.formats import read_rows
from reft_serve.datafiles.lines import FileLimits
from reft_serve.errors import DataInvalid
from reft_serve.evaluation.predictions import questions
from reft_serve.recipes.recipe import load_recipe
from tests.support.paths import SHARED

SETS = SHARED / "data" / "reft_paper"
FILES = sorted(
    path
    for folder in ("commonsense", "math", "instruct", "glue")
    for path in (SETS / folder).glob("*.json*")
)
# Files that hold nothing to learn, and what is said of them first.
NO_ANSWER = 'has neither an "output" nor an "answer", so there is nothing to learn'
REFUSED = {
    "alpaca_instructions_5k.jsonl": f"line 1: {NO_ANSWER}",
    "alpaca_eval_davinci003_805.jsonl": f"line 248: {NO_ANSWER}",
    "emoji_10.jsonl": f"line 1: {NO_ANSWER}",
    "selected_alpaca_refusal_6901.jsonl.gz": "line 1: has an unknown format: its keys are 'index', 'base_prompt', "
    "'source_prompt', 'label'",
    "sst2_test.jsonl": "line 1: label is -1, which marks a test row without a label",
}

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(
        not FILES, reason="the shared data folder does not lie beside the repository"
    ),
]


@pytest.fixture
def plain(tmp_path: Path) -> Callable[[Path], Path]:
    """A file as it is published: unpacked."""

    def unpack(path: Path) -> Path:
        if path.suffix != ".gz":
            return path
        (tmp_path / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        return tmp_path / path.stem

    return unpack


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_public_set_is_read_whole_and_its_recipe_asks_every_row(
    path: Path, plain: Callable[[Path], Path]
) -> None:
    if path.name in REFUSED:
        with pytest.raises(DataInvalid) as caught:
            read_rows(plain(path))
        assert caught.value.faults[0] == REFUSED[path.name]
        return
    rows = read_rows(plain(path))
    folder, name = path.parent.name, path.name.split("_")[0]
    assert rows.format == ("glue" if folder == "glue" else "instruction")
    assert [line for line, _ in rows.rows] == list(
        range(1, plain(path).read_bytes().count(b"\n") + 1)
    )
    task = load_recipe(f"glue-{name}" if folder == "glue" else folder).task
    assert task
    asked = questions(rows, task)
    assert len(asked) == len(rows.rows)
    assert all(question.prompt.strip() for question in asked)
    assert folder == "instruct" or all(question.reference.strip() for question in asked)


@pytest.mark.parametrize(
    "name", ["alpaca_instructions_5k.jsonl", "alpaca_eval_davinci003_805.jsonl", "emoji_10.jsonl"]
)
def test_instructions_without_answers_can_be_asked_for_alpacaeval(name: str) -> None:
    rows = read_rows(SETS / "instruct" / name, FileLimits(unanswered=True))
    task = load_recipe("instruct").task
    assert task
    assert len(questions(rows, task)) == (SETS / "instruct" / name).read_bytes().count(b"\n")
