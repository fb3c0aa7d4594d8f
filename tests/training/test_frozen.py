"""What leaves the lowest edited layer is computed once per example, and changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reft_serve.adapters.directory import read_adapter
from reft_serve.training.data.batching import collate
from reft_serve.training.data.examples import Example, Preference
from reft_serve.training.loop.run import train
from reft_serve.training.model.adapter import build
from reft_serve.training.model.edited_model import EditedModel
from reft_serve.training.model.state_cache import StateCache, worth_keeping
from reft_serve.training.plan import AdapterPlan, LoraPlan, Plan
from tests.support.engine.family_models import FAMILIES
from tests.support.paths import GOLDEN
from tests.support.training.models import RULE, edited, examples_of, learnt
from tests.support.training.runs import BASE, StopsAt, examples, metrics, pairs

UPPER = AdapterPlan("loreft", 4, (2, 3), RULE)


def check_equal(model: EditedModel, *, packed: bool) -> None:
    batch = collate(examples_of(model, 5), RULE, packed=packed)
    whole, kept = learnt(model, batch), learnt(model, StateCache(model).join(batch))
    torch.testing.assert_close(kept[0], whole[0], rtol=1e-5, atol=2e-5)
    largest = max(float(grad.abs().max()) for grad in whole[1])
    assert largest > 1e-3
    torch.testing.assert_close(kept[1], whole[1], rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("lowest", [0, 1, 3])
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_answers_and_gradients_are_those_of_the_whole_model(
    name: str, lowest: int, packed: bool
) -> None:
    model = edited(GOLDEN / "models" / name, lowest)
    assert model.can_pack(64)
    check_equal(model, packed=packed)


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_in_every_family(name: str, tmp_path: Path) -> None:
    FAMILIES[name].build(tmp_path)
    model = edited(tmp_path, 1)
    check_equal(model, packed=model.can_pack(64))


def test_states_are_the_same_bits_in_any_company() -> None:
    model, some = edited(BASE, 2), examples(8)
    assert model.can_pack(64)
    apart, together = StateCache(model), StateCache(model)
    alone = [apart.join(collate([each], RULE, packed=True)).states for each in some]
    joined = together.join(collate(some[::-1], RULE, packed=True)).states
    assert joined is not None
    assert torch.equal(torch.cat([each for each in alone[::-1] if each is not None], 1), joined)


@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_a_run_computes_each_example_once_and_learns_the_same(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items: list[Example] | list[Preference] = pairs(12) if method == "dpo" else examples(12)
    counts = []
    compute = EditedModel.frozen_states

    def counted(self: EditedModel, batch: Any) -> Tensor:
        counts[-1] += len(batch.lengths)
        return compute(self, batch)

    monkeypatch.setattr(EditedModel, "frozen_states", counted)
    plan = Plan(UPPER, method=method, epochs=4, batch=4, learning_rate=5e-3)
    weights = []
    for keep in (0.0, 1.0):
        counts.append(0)
        out = tmp_path / str(keep)
        train(BASE, replace(plan, keep_states=keep), items[:8], out, held_out=items[8:])
        weights.append([each.tensors() for each in read_adapter(out / "adapter").weights])
    assert counts == [0, 24 if method == "dpo" else 12]
    assert metrics(tmp_path / "1.0", "loss") == pytest.approx(
        metrics(tmp_path / "0.0", "loss"), rel=1e-5
    )
    assert metrics(tmp_path / "1.0", "eval_loss") == pytest.approx(
        metrics(tmp_path / "0.0", "eval_loss"), rel=1e-5
    )
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    plan = Plan(UPPER, epochs=3, batch=4, learning_rate=1e-2)
    whole = train(BASE, plan, examples(16), tmp_path / "whole")
    train(BASE, plan, examples(16), tmp_path / "run", watchers=[StopsAt(6)])
    assert (
        train(BASE, plan, examples(16), tmp_path / "run", resume=True).digest
        == whole.digest
        is not None
    )


@pytest.mark.parametrize(
    ("change", "processes", "kept"),
    [
        ({}, 1, True),
        ({"epochs": 1}, 1, False),
        ({"max_steps": 4}, 1, False),
        ({"max_steps": 5}, 1, True),
        ({}, 3, False),
        ({"keep_states": 0.0}, 1, False),
        ({"keep_states": 64 * 100 * 4 * 64 / 2**30}, 1, True),
        ({"keep_states": 64 * 100 * 4 * 63 / 2**30}, 1, False),
        ({"lora": LoraPlan()}, 1, False),
        ({"dtype": "float16"}, 1, False),
    ],
)
def test_states_are_kept_where_they_come_again_and_fit(
    change: dict[str, Any], processes: int, kept: bool
) -> None:
    model = build(BASE, Plan(UPPER))
    assert model.state_bytes == 64 * 4
    plan = replace(Plan(UPPER, epochs=3, batch=16), **change)
    assert worth_keeping(model, plan, 64, 64 * 100, processes) is kept


def test_what_is_held_out_takes_memory_and_makes_no_epoch_longer() -> None:
    model, plan = build(BASE, Plan(UPPER)), Plan(UPPER, max_steps=5, batch=16)
    assert worth_keeping(model, plan, 64, 1000 * 100, 1)
    assert not worth_keeping(model, replace(plan, keep_states=0.001), 64, 1000 * 100, 1)


def test_little_is_saved_where_all_of_many_layers_are_edited() -> None:
    model = build(BASE, Plan(UPPER))
    model.lowest, model.depth = 0, 6
    assert not worth_keeping(model, Plan(UPPER), 64, 64 * 100, 1)
