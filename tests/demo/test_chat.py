"""The chat demonstration runs from a package of the registry to answers in emoji."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from reft_serve.datafiles.formats import read_rows
from reft_serve.demo.chat import EXAMPLES, QUESTIONS, is_emoji
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("text", "emoji"),
    [
        ("🐶🐾", True),
        (" ☀️ 🌊\n", True),
        ("4️⃣", True),
        ("🐶 dogs", False),
        ("Dogs are pets.", False),
        ("", False),
        ("12", False),
    ],
)
def test_emoji_are_told_from_words(text: str, emoji: bool) -> None:
    assert is_emoji(text) == emoji


def test_the_examples_are_ten_and_no_question_is_among_them() -> None:
    rows = [json.loads(line) for line in EXAMPLES.read_text().splitlines()]
    assert len(rows) == 10
    asked = {row["messages"][0]["content"] for row in rows}
    assert all(is_emoji(row["messages"][1]["content"]) for row in rows)
    assert asked.isdisjoint(QUESTIONS)
    assert read_rows(EXAMPLES).format == "chat"


@pytest.mark.real
@pytest.mark.alone
@pytest.mark.slow
def test_the_chat_model_learns_emoji_and_answers_with_and_without_them() -> None:
    ended = subprocess.run(
        [str(ROOT / "scripts" / "demo"), "--chat", "--no-input"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if "pip cannot download" in ended.stderr:
        pytest.skip(ended.stderr.strip().splitlines()[-1])
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Ready after" in ended.stdout
    assert "questions in emoji" in ended.stdout
    for vllms in ("WARNING", "leaked", "Traceback", "force kill"):
        assert vllms not in ended.stdout + ended.stderr
