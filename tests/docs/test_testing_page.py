"""The example of docs/testing.md passes as it is written, and its tables name fields of the fake engine."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

from reft_serve.testing import FakeEngine
from tests.support.blocks import blocks
from tests.support.paths import ROOT

PAGE = "docs/testing.md"


def test_the_example_passes(tmp_path: Path) -> None:
    (example,) = (block for block in blocks(PAGE) if block.how == "yes")
    (tmp_path / "test_application.py").write_text(example.code)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", tmp_path, tmp_path],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 passed" in ended.stdout


def test_the_tables_name_fields() -> None:
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / PAGE).read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named <= {field.name for field in dataclasses.fields(FakeEngine)}
    assert len(named) > 10
