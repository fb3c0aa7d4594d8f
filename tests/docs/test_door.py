"""AGENTS.md and llms.txt name files and commands that exist."""

from __future__ import annotations

import re

import pytest

from tests.support.paths import ROOT

LINKS = sorted(set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "llms.txt").read_text())))
NAMED = sorted(set(re.findall(r"`([\w./]+/|[\w./]+\.(?:py|md)|scripts/\w+)`", (ROOT / "AGENTS.md").read_text())))


@pytest.mark.parametrize("path", LINKS)
def test_a_link_of_llms_txt_leads_to_a_file(path: str) -> None:
    assert (ROOT / path).is_file()


def test_llms_txt_links_every_page() -> None:
    included = {"docs/changelog.md", "docs/contributing.md", "docs/index.md"}
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    assert pages - included <= set(LINKS)


@pytest.mark.parametrize("path", NAMED)
def test_a_path_of_agents_md_exists(path: str) -> None:
    assert any((folder / path).exists() for folder in (ROOT, ROOT / "reft_serve"))


def test_the_layout_of_agents_md_is_complete() -> None:
    folders = {path.parent.name for path in (ROOT / "reft_serve").glob("*/__init__.py")}
    assert {f"{name}/" for name in folders} <= set(NAMED)
