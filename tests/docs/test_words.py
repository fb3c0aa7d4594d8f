"""No sentence that people read has a word that CONTRIBUTING.md asks to avoid."""

from __future__ import annotations

import subprocess
import sys

from tests.support.paths import ROOT

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
]


def words(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "words.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_sentences_of_the_code_have_no_word_to_avoid() -> None:
    """Settings, routes, errors, events, log lines, help and metrics."""
    found = words()
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_pages_have_no_word_to_avoid() -> None:
    found = words(*PAGES)
    assert found.returncode == 0, found.stdout + found.stderr
