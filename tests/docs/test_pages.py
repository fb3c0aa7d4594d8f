"""The pages: they build, their links lead somewhere, their commands run, their tables and pictures are those of the code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import pictures, tables
from tests.support.blocks import Block, blocks
from tests.support.paths import ROOT

PAGES = ["README.md", "docs/load.md", "docs/quick-start.md", "docs/tenancy.md", "CONTRIBUTING.md"]
RUNNABLE = [block for page in PAGES for block in blocks(page) if block.how == "yes"]


def test_the_site_builds_and_no_link_or_anchor_is_broken(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    page = (tmp_path / "site" / "comparison" / "index.html").read_text()
    assert '<img alt="Speed relative to the base" src="../results/serving.png"' in page
    assert (tmp_path / "site" / "results" / "serving.png").stat().st_size > 10_000
    everything = "".join(path.read_text() for path in (tmp_path / "site").rglob("*.html"))
    assert "fonts.googleapis" not in everything
    assert "unpkg.com" not in everything


@pytest.mark.parametrize("name", tables.PAGES)
def test_tables_are_those_of_the_code(name: str) -> None:
    page = (ROOT / "docs" / name).read_text()
    assert page == tables.filled(page), "bring the tables up to date: scripts/docs --write"
    assert page.count("\n| ") >= 6


def test_every_advanced_setting_is_marked() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    marked = {line.split("`")[1] for line in page.splitlines() if "| *Advanced.* " in line}
    assert marked == tables.ADVANCED


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_those_of_the_script(name: str) -> None:
    assert (pictures.IMAGES / f"{name}.svg").read_text() == pictures.PICTURES[name](), (
        "bring the pictures up to date: scripts/docs --write"
    )


def test_every_block_of_a_shell_says_whether_it_runs() -> None:
    assert [
        str(block)
        for page in PAGES
        for block in blocks(page)
        if block.language == "bash" and block.how is None
    ] == []
    assert len(RUNNABLE) >= 3


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_commands_run_as_they_are_written(block: Block, tmp_path: Path) -> None:
    # As in a checkout, but what they write is thrown away.
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    for name in ("reft_serve", "benchmarks", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        check=False, env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
