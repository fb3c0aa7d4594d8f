"""`--help` shows what the source says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import reft_serve
from reft_serve.cli.app import app

SOURCES = {
    "train": "cli/train.py", "worker": "cli/worker.py", "serve": "cli/serve.py", "up": "cli/up.py", "logs": "cli/logs.py",
    "gateway": "cli/gateway.py", "evaluate": "cli/evaluate.py",
}  # fmt: skip


def help_strings(source: Path) -> list[str]:
    """Every `help="..."` of a module."""
    calls = (node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call))
    values = (word.value for call in calls for word in call.keywords if word.arg == "help")
    return [str(value.value) for value in values if isinstance(value, ast.Constant)]


@pytest.mark.parametrize("verb", SOURCES)
def test_help_shows_every_option_with_its_default(verb: str) -> None:
    shown = (
        CliRunner()
        .invoke(app, [verb, "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
        .output
    )
    plain = re.sub(r"\s+", " ", shown)
    strings = help_strings(Path(reft_serve.__file__).parent / SOURCES[verb])
    assert not [each for each in strings if re.sub(r"\s+", " ", each) not in plain]


def test_train_has_defaults_in_brackets() -> None:
    strings = help_strings(Path(reft_serve.__file__).parent / "cli/train.py")
    assert sum(bool(re.search(r"\[[a-z]", each)) for each in strings) >= 9
