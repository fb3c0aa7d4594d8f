"""The facts of a base model come from its config.json, or a sentence says what is wrong with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.manifest import BaseFacts
from reft_serve.errors import BaseModelInvalid
from tests.support.paths import GOLDEN

GOOD = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("model", "architecture"),
    [("tiny-llama", "LlamaForCausalLM"), ("tiny-gpt2", "GPT2LMHeadModel")],
)
def test_golden_models_are_read(model: str, architecture: str) -> None:
    facts = read_base_model(GOLDEN / "models" / model)
    assert facts == BaseFacts(
        name=model, architecture=architecture, hidden_size=64, num_hidden_layers=4
    )


def test_a_nested_text_configuration_gives_the_sizes(tmp_path: Path) -> None:
    nested = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "hidden_size": 7,
        "text_config": GOOD,
    }
    (tmp_path / "config.json").write_text(json.dumps(nested))
    facts = read_base_model(tmp_path)
    assert (facts.architecture, facts.hidden_size) == ("Gemma3ForConditionalGeneration", 64)


def test_a_linked_configuration_is_followed_because_hub_caches_link(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text(json.dumps(GOOD))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "blob")
    assert read_base_model(tmp_path / "model").hidden_size == 64


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        (None, "holds no config.json"),
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a JSON object"),
        ("\udcff", "is not JSON"),
        (json.dumps({**GOOD, "architectures": None}), "does not give its architecture"),
        (json.dumps({**GOOD, "architectures": []}), "does not give its architecture"),
        (
            json.dumps({"architectures": ["X"]}),
            "does not give its hidden_size or num_hidden_layers",
        ),
        (json.dumps({**GOOD, "hidden_size": "64"}), "hidden_size: Input should be a valid integer"),
        (
            json.dumps({**GOOD, "num_hidden_layers": 0}),
            "num_hidden_layers: Input should be greater",
        ),
        (
            json.dumps({**GOOD, "architectures": [7]}),
            "architecture: Input should be a valid string",
        ),
    ],
)
def test_a_missing_or_garbled_configuration_gets_a_sentence(
    tmp_path: Path, text: str | None, phrase: str
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BaseModelInvalid, match=phrase):
        read_base_model(tmp_path)


def test_a_base_that_is_no_directory_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BaseModelInvalid, match="is not a directory"):
        read_base_model(tmp_path / "meta-llama")


def test_a_huge_configuration_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.touch()
    os.truncate(file, 5 << 20)
    with pytest.raises(BaseModelInvalid, match="at most"):
        read_base_model(tmp_path)
