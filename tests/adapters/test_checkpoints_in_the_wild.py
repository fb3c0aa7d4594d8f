"""Saves that people published, made by pyreft and its forks: every one is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.importers.common import ImportFlags
from reft_serve.adapters.importers.detection import import_adapter
from tests.support.paths import SHARED

CHECKPOINTS = SHARED / "data" / "pyreft_ckpts"
INDEX = json.loads((CHECKPOINTS / "INDEX.json").read_text()) if CHECKPOINTS.is_dir() else []

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(
        not INDEX, reason="the shared data folder does not lie beside the repository"
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen")
    facts = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 1536, "num_hidden_layers": 28}
    (path / "config.json").write_text(json.dumps(facts))
    return path


@pytest.mark.parametrize("entry", INDEX, ids=lambda entry: entry["dir"])
def test_a_published_save_is_imported(entry: dict[str, Any], base: Path, tmp_path: Path) -> None:
    source = CHECKPOINTS / str(entry["dir"])
    flags = ImportFlags(positions="l1")
    (recorded,) = entry["types"]
    adapter = import_adapter(source, read_base_model(base), tmp_path / "a", flags)
    (weights,) = adapter.weights
    (file,) = source.glob("*.bin")
    saved = torch.load(file, weights_only=True)
    if "BiasIntervention" in recorded:
        tensors = weights.tensors()  # the vector, as a length along one direction
        assert torch.allclose(tensors["b"] @ tensors["R"], saved["bias"].reshape(-1), atol=1e-5)
        return
    assert torch.equal(weights.tensors()["R"], saved["rotate_layer"].mT)
    assert torch.equal(weights.tensors()["W"], saved["weight"])
    assert torch.equal(weights.tensors()["b"], saved["bias"])
    (spec,) = adapter.manifest.interventions
    assert [spec.layer, spec.component, "pos", 1, spec.rank] == entry["reps"][0]
    assert adapter.warnings == ()


def test_the_folder_holds_what_its_index_says() -> None:
    assert len(INDEX) == 14
