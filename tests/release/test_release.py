"""`scripts/release check` finds versions that disagree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import reft_serve
from tests.support.paths import ROOT

VERSION = reft_serve.__version__


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that are compared."""
    for name in ("docker", "deploy"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("reft_serve/__init__.py", "scripts/release.py"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text(
        f"# Changelog\n\n## Unreleased\n\n## {VERSION} - 2026-11-30\n\n### Added\n"
    )
    return tmp_path


def _check(checkout: Path) -> list[str]:
    command = [sys.executable, str(checkout / "scripts" / "release.py"), "check"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    faults = ended.stderr.splitlines()
    assert ended.returncode == (1 if faults else 0)
    return faults


def test_versions_that_agree_have_no_faults(checkout: Path) -> None:
    assert _check(checkout) == []


def test_the_changelog_begins_with_this_version_or_with_unreleased_changes() -> None:
    headings = [
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")
    ]
    assert headings[0] == "## Unreleased"
    assert headings[1].startswith(f"## {VERSION} - ")


@pytest.mark.parametrize(
    ("path", "old", "new", "fault"),
    [
        (
            "CHANGELOG.md",
            f"## {VERSION} - 2026-11-30",
            "## 9.9.9 - 2026-11-30",
            "the newest in CHANGELOG.md is 9.9.9",
        ),
        ("CHANGELOG.md", " - 2026-11-30", "", "CHANGELOG.md needs a date"),
        (
            "CHANGELOG.md",
            "## Unreleased\n",
            "## Unreleased\n\n- A change.\n",
            "CHANGELOG.md has unreleased changes",
        ),
        (
            "docker/compose.yaml",
            f"gateway:{VERSION}",
            "gateway:9.9.9",
            "docker/compose.yaml has the tag 9.9.9",
        ),
        (
            "deploy/base/kustomization.yaml",
            f"newTag: {VERSION}",
            "newTag: 9.9.9",
            "kustomization.yaml has the tag 9.9.9",
        ),
    ],
)
def test_a_version_that_disagrees_is_named(
    checkout: Path, path: str, old: str, new: str, fault: str
) -> None:
    file = checkout / path
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    (found,) = _check(checkout)
    assert fault in found
