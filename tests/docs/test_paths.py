"""The files that pages, AGENTS.md and llms.txt name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "reft_serve"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
_FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|toml|ya?ml))`")
LINKS = sorted(set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "llms.txt").read_text())))
AGENTS = sorted(
    set(
        re.findall(r"`([\w./]+/|[\w./]+\.(?:py|md)|scripts/\w+)`", (ROOT / "AGENTS.md").read_text())
    )
)
REQUEST_PATH = _FILE.findall((ROOT / "docs" / "request-path.md").read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_file_that_a_page_names_exists(page: Path) -> None:
    bases = (ROOT, PACKAGE, ROOT / "deploy")
    missing = [
        name
        for name in _FILE.findall(page.read_text())
        if not any((base / name).is_file() for base in bases)
    ]
    assert missing == []


def test_the_path_of_a_request_leads_through_every_process() -> None:
    assert len(set(REQUEST_PATH)) > 40
    assert {name.partition("/")[0] for name in REQUEST_PATH} >= {
        "gateway",
        "engine",
        "training",
        "database",
    }


@pytest.mark.parametrize("path", AGENTS)
def test_a_path_of_agents_md_exists(path: str) -> None:
    assert any((base / path).exists() for base in (ROOT, PACKAGE))


def test_the_layout_of_agents_md_is_complete() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {f"{name}/" for name in folders} <= set(AGENTS)


@pytest.mark.parametrize("path", LINKS)
def test_a_link_of_llms_txt_leads_to_a_file(path: str) -> None:
    assert (ROOT / path).is_file()


def test_llms_txt_links_every_page() -> None:
    included = {"docs/changelog.md", "docs/contributing.md", "docs/index.md"}
    pages = {str(path.relative_to(ROOT)) for path in PAGES if path.parent == ROOT / "docs"}
    assert pages - included <= set(LINKS)
