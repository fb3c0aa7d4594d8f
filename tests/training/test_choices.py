"""What "auto" comes to, and what is reckoned with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reft_serve.adapters.manifest import BaseFacts
from reft_serve.interventions.positions import PositionRule
from reft_serve.recipes.hyperparameters import read_hyperparameters
from reft_serve.training import machine
from reft_serve.training.defaults import DataFacts, most_tokens, plan_from_job, resolve
from reft_serve.training.jobs.memory import context_of, estimate
from tests.support.training.jobs import MODEL

WIDE = BaseFacts(name="x", architecture="LlamaForCausalLM", hidden_size=4096, num_hidden_layers=32)
NARROW = BaseFacts(name="x", architecture="LlamaForCausalLM", hidden_size=6, num_hidden_layers=2)


def chosen(
    base: BaseFacts = WIDE, examples: int = 1000, longest: int = 100, **asked: object
) -> dict[str, object]:
    data = DataFacts(examples, longest)
    return resolve(read_hyperparameters(asked), "supervised", base, data, 2048, "float32", 7)


def test_auto_is_the_papers_choice_sized_by_model_and_data() -> None:
    found = chosen()
    assert (found["kind"], found["positions"], found["tied"], found["layers"]) == (
        "loreft",
        "f7+l7",
        True,
        "all",
    )
    assert (found["learning_rate"], found["batch_size"], found["rank"]) == (9e-4, 16, 4)
    assert chosen(examples=12)["batch_size"] == 4
    assert (
        chosen(examples=12)["n_epochs"],
        chosen()["n_epochs"],
        chosen(examples=200_000)["n_epochs"],
    ) == (12, 3, 1)
    assert (chosen(NARROW, examples=5000)["rank"], chosen(examples=5000)["rank"]) == (6, 8)
    assert chosen(NARROW)["learning_rate"] == 4e-3
    assert chosen(learning_rate_multiplier=2.0)["learning_rate"] == pytest.approx(1.8e-3)
    assert chosen(longest=2000)["accumulation"] == 4, "a part of a batch holds at most 8,192 tokens"
    assert chosen(examples=30)["save_every"] == 8, "an epoch"


def test_what_is_asked_for_is_taken_and_the_record_makes_the_same_plan_again() -> None:
    asked: dict[str, Any] = {
        "n_epochs": 2, "batch_size": 6, "accumulation": 4, "learning_rate": 0.01, "kind": "direft", "rank": 2,
        "layers": [3, 1, 1], "positions": "f2+l3", "tied": False, "activation": "relu", "dropout": 0.1, "lora_rank": 8,
        "lora_targets": ["q_proj"], "schedule": "cosine", "warmup": 0.0, "save_every": 5, "beta": 0.3,
    }  # fmt: skip
    record = chosen(**asked)
    plan = plan_from_job(json.loads(json.dumps(record)))
    assert plan == plan_from_job(record)
    plan.check()
    assert plan.adapter.layers == (1, 3)
    assert plan.adapter.rule == PositionRule("f2+l3", tied=False)
    assert (plan.batch, plan.accumulate, plan.seed, plan.dpo_beta) == (2, 4, 7, 0.3)
    assert plan.lora is not None
    assert (plan.lora.rank, plan.lora.alpha, plan.lora.targets) == (8, 16.0, ("q_proj",))


def test_no_example_is_longer_than_the_context() -> None:
    assert most_tokens(read_hyperparameters({}), 1024) == 1024
    assert most_tokens(read_hyperparameters({}), None) == 2048
    assert most_tokens(read_hyperparameters({"max_tokens": 64}), 1024) == 64
    assert context_of(MODEL) == 1024


def test_memory_grows_with_what_a_step_holds_and_is_not_told_for_what_is_not_there(
    tmp_path: Path,
) -> None:
    little = estimate(
        MODEL,
        read_hyperparameters({"batch_size": 1, "accumulation": 1, "max_tokens": 64}),
        gpu=False,
    )
    much = estimate(MODEL, read_hyperparameters({"batch_size": 64, "accumulation": 1}), gpu=False)
    assert 700 << 20 < little < 1 << 30
    assert much > 3 * little
    few = read_hyperparameters(
        {"batch_size": 1, "accumulation": 1, "max_tokens": 64, "layers": [1]}
    )
    assert (estimate(MODEL, few, gpu=False) - little) == 1 << 30
    for wrong in ("", "{", '{"hidden_size": "x"}'):
        (tmp_path / "config.json").write_text(wrong)
        with pytest.raises((OSError, ValueError)):
            estimate(tmp_path, read_hyperparameters({}), gpu=False)


def test_a_container_has_what_it_is_allowed(tmp_path: Path) -> None:
    whole = machine.memory(tmp_path), machine.cores(tmp_path)
    assert whole[0] > 1 << 28
    assert whole[1] >= 1
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert (machine.memory(tmp_path), machine.cores(tmp_path)) == whole
    (tmp_path / "memory.max").write_text("1048576\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert (machine.memory(tmp_path), machine.cores(tmp_path)) == (1 << 20, 1)
