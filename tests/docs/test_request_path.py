"""docs/request-path.md names files that exist."""

from __future__ import annotations

import re

import pytest

from tests.support.paths import ROOT

PATHS = sorted(set(re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "request-path.md").read_text())))


@pytest.mark.parametrize("path", PATHS)
def test_a_file_on_the_path_exists(path: str) -> None:
    assert (ROOT / "reft_serve" / path).is_file()


def test_the_page_leads_through_every_process() -> None:
    assert {path.partition("/")[0] for path in PATHS} >= {"gateway", "engine", "interventions", "training", "database"}
