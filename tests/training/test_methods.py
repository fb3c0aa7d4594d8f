"""DPO, a LoRA beside the interventions, and what the loop does with batches, dtypes and
watchers.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from reft_serve.adapters.directory import read_adapter
from reft_serve.errors import AdapterInvalid, BaseModelInvalid, ClientError
from reft_serve.interventions.kinds import edit
from reft_serve.training.data.batching import StepSampler, collate, micro_batches
from reft_serve.training.data.examples import IGNORED, Example
from reft_serve.training.loop.run import train
from reft_serve.training.model.adapter import build, restore
from reft_serve.training.plan import LoraPlan, Plan, parse_layers
from tests.support.training.runs import BASE, SHAPE, StopsAt, examples, metrics, pairs


def test_dpo_learns_the_preference(tmp_path: Path) -> None:
    plan = Plan(
        SHAPE, method="dpo", epochs=10, batch=4, learning_rate=5e-3, dpo_beta=0.5, save_every=20
    )
    out = tmp_path / "run"
    train(BASE, plan, pairs(12), out, held_out=pairs(12))
    losses = metrics(out, "loss")
    assert losses[-1] < losses[0] / 3
    assert metrics(out, "eval_accuracy")[-1] == 1.0
    assert metrics(out, "eval_margin")[-1] > 1


def test_the_dpo_loss_is_that_of_the_paper(tmp_path: Path) -> None:
    (pair,) = pairs(1)
    plan = Plan(SHAPE, method="dpo", epochs=1, max_steps=1, batch=1, dpo_beta=0.3)
    train(BASE, plan, [pair], tmp_path / "run")
    model = build(BASE, plan)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)

    def ratio(answer: tuple[int, ...]) -> float:
        whole, start = pair.prompt_ids + answer, len(pair.prompt_ids)
        example = Example(whole, (IGNORED,) * start + answer, start)
        edited = model.eval().score(collate([example], SHAPE.rule, packed=False))[0].sum().item()
        with torch.no_grad():
            logits = base(torch.tensor([whole])).logits[0, start - 1 : -1]
        return edited + cross_entropy(logits, torch.tensor(answer), reduction="sum").item()

    margin = 0.3 * (ratio(pair.chosen_ids) - ratio(pair.rejected_ids))
    assert metrics(tmp_path / "run", "loss")[0] == pytest.approx(
        math.log1p(math.exp(-margin)), rel=1e-4
    )


def test_dpo_needs_preferences_and_the_rest_needs_examples(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="dpo learns from preferences"):
        train(BASE, Plan(method="dpo"), examples(2), tmp_path / "run")
    with pytest.raises(ClientError, match="supervised learns from examples"):
        train(BASE, Plan(), pairs(2), tmp_path / "run")


def test_a_lora_is_trained_and_saved_beside_the_edits(tmp_path: Path) -> None:
    plan = Plan(
        SHAPE, LoraPlan(2, 4.0, targets=("q_proj", "v_proj")), epochs=6, batch=6, learning_rate=1e-2
    )
    out = tmp_path / "run"
    outcome = train(BASE, plan, examples(12), out, held_out=examples(3))
    adapter = read_adapter(out / "adapter")
    assert adapter.lora is not None
    assert adapter.lora.rank == 2
    assert metrics(out, "loss")[-1] < metrics(out, "loss")[0]
    model, rule = restore(BASE, out / "adapter")
    batch = collate(examples(3), rule, packed=False)
    both = model.score(batch)[0]
    assert -both.mean().item() == pytest.approx(outcome.best_loss, rel=1e-5)
    # PEFT by itself, with the edits made by hand: what any reader of the two halves must get.
    lm = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), str(out / "adapter")
    )
    by_hand = []
    for example in examples(3):
        rows = [i for part in rule.indices(example.prompt_len) for i in part]
        hooks = [
            lm.base_model.model.model.layers[spec.layer].register_forward_hook(
                lambda _m, _i, h, w=weights, at=rows: h.index_copy(
                    1, torch.tensor(at), edit(h[:, at], w)
                )
            )
            for spec, weights in zip(adapter.manifest.interventions, adapter.weights, strict=True)
        ]
        with torch.no_grad():
            logprobs = lm(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        by_hand += [
            logprobs[t - 1, label].item()
            for t, label in enumerate(example.labels)
            if label != IGNORED
        ]
        for hook in hooks:
            hook.remove()
    assert torch.allclose(both, torch.tensor(by_hand), atol=1e-4)
    assert not torch.allclose(both, model.base_score(batch), atol=0.1), (
        "the base alone is without both halves"
    )


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"compile": True}])
def test_how_layers_are_run_changes_no_weight(change: dict[str, Any], tmp_path: Path) -> None:
    plan = Plan(SHAPE, epochs=2, batch=4, learning_rate=1e-2)
    for name, one in (("plain", plan), ("changed", replace(plan, **change))):
        train(BASE, one, examples(12), tmp_path / name, held_out=examples(3))
    plain, changed = (
        read_adapter(tmp_path / name / "adapter").weights for name in ("plain", "changed")
    )
    for mine, theirs in zip(plain, changed, strict=True):
        for name, tensor in mine.tensors().items():
            assert torch.allclose(tensor, theirs.tensors()[name], atol=1e-6), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_computed_again_from_the_first_step_where_that_is_asked(
    checkpointing: bool,
) -> None:
    model = build(BASE, Plan(SHAPE, gradient_checkpointing=checkpointing))
    ran: list[nn.Module] = []
    for layer in model.lm.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, _: ran.append(module))
    model.train()
    model(collate(examples(3), SHAPE.rule, packed=False)).sum().backward()
    # Nothing is recorded of the first layer, below the lowest edit.
    assert [ran.count(layer.mlp) for layer in model.lm.model.layers[1:]] == [1 + checkpointing] * 3


def test_compiling_without_a_compiler_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ClientError, match="no-such-compiler is not found"):
        train(BASE, Plan(SHAPE, compile=True), examples(3), tmp_path / "run")


def test_how_a_step_is_cut_changes_only_the_rounding(tmp_path: Path) -> None:
    """Examples of one step in one batch or three: the loss is the mean over all their tokens."""
    plan = Plan(SHAPE, epochs=3, batch=12, learning_rate=1e-2)
    for name, one in (("whole", plan), ("cut", replace(plan, batch=4, accumulate=3))):
        train(BASE, one, examples(24), tmp_path / name)
    assert metrics(tmp_path / "whole", "loss") == pytest.approx(
        metrics(tmp_path / "cut", "loss"), rel=1e-4
    )


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    plan = Plan(SHAPE, epochs=3, batch=12, learning_rate=1e-2)
    alone = train(BASE, plan, examples(24), tmp_path / "alone", held_out=examples(6))
    two = tmp_path / "two"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launch, "tests.support.training.run_of_two", str(two)],
        env=environment,
        check=True,
        timeout=200,
    )
    for name in ("loss", "eval_loss"):
        assert metrics(tmp_path / "alone", name) == pytest.approx(
            metrics(two / "measured", name), rel=1e-5
        ), name
    assert metrics(two / "measured", "tokens")[-1] == alone.tokens
    saved = {path.name for path in (two / "saving" / "checkpoints").iterdir()}
    assert saved == {"checkpoint-1", "checkpoint-2"}


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    plan = Plan(SHAPE, epochs=3, batch=6, learning_rate=1e-2)
    for name, one in (("full", plan), ("half", replace(plan, dtype="bfloat16"))):
        train(BASE, one, examples(24), tmp_path / name)
    assert metrics(tmp_path / "full", "loss") == pytest.approx(
        metrics(tmp_path / "half", "loss"), rel=0.03
    )
    assert all(
        spec.dtype == "float32"
        for spec in read_adapter(tmp_path / "half" / "adapter").manifest.interventions
    )
    with pytest.raises(ClientError, match="float16 needs a GPU"):
        build(BASE, replace(plan, dtype="float16"))


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        (
            "LlamaForSequenceClassification",
            "its head classifies or fills in tokens and generates no text",
        ),
        ("LlamaModel", "lacks 1 tensors of a language model, lm_head.weight first"),
    ],
)
def test_a_base_without_a_language_models_head_is_refused(
    architecture: str, reason: str, tmp_path: Path
) -> None:
    """Its head would be made up, and an adapter trained to it."""
    config = AutoConfig.from_pretrained(BASE, num_labels=2, tie_word_embeddings=False)
    getattr(transformers, architecture)(config).save_pretrained(tmp_path / "base")
    with pytest.raises(BaseModelInvalid, match=reason) as caught:
        build(tmp_path / "base", Plan(SHAPE))
    assert "use the causal language model of its family as --base" in str(caught.value)
    assert "glue-cola" in str(caught.value)


def test_a_run_that_diverges_is_not_published(tmp_path: Path) -> None:
    shape = replace(SHAPE, kind="nodireft")
    with pytest.raises(AdapterInvalid, match="NaN or Inf"):
        train(
            BASE,
            Plan(shape, epochs=3, batch=4, learning_rate=1e30, clip=0),
            examples(8),
            tmp_path / "run",
        )
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_watcher_stops_a_run_within_a_step_and_it_can_be_resumed(tmp_path: Path) -> None:
    plan = Plan(SHAPE, epochs=2, batch=4, learning_rate=1e-2)
    whole = train(BASE, plan, examples(16), tmp_path / "whole")
    watcher = StopsAt(3)
    stopped = train(BASE, plan, examples(16), tmp_path / "run", watchers=[watcher])
    assert (stopped.step, stopped.steps, stopped.adapter) == (3, 8, None)
    assert [path.name for path in watcher.paths] == ["checkpoint-3"]
    resumed = train(BASE, plan, examples(16), tmp_path / "run", resume=True)
    assert resumed.digest == whole.digest is not None


def test_each_epoch_has_an_order_of_its_own_and_every_example_once() -> None:
    lengths = [5 + i % 7 for i in range(23)]
    sampler = StepSampler(lengths, 4, 2, seed=1, shuffle=True)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.epoch = epoch
        batches = list(sampler)
        assert len(batches) == len(sampler) == 6
        assert sorted(itertools.chain(*batches)) == list(range(23))
        epochs.append(batches)
    assert epochs[0] == epochs[2] != epochs[1]


def test_the_trainer_moves_on_to_the_next_epochs_order(tmp_path: Path) -> None:
    """Two examples of unlike loss, one a step: an order that never changed would repeat the first
    epoch's pattern.
    """
    plan = Plan(replace(SHAPE, layers=(3,)), epochs=12, batch=1, learning_rate=1e-9)
    train(BASE, plan, examples(2), tmp_path / "run")
    losses = metrics(tmp_path / "run", "loss")
    firsts = {round(loss, 3) for loss in losses[::2]}
    assert len(firsts) == 2


def test_a_micro_batch_holds_like_lengths_and_processes_have_like_work() -> None:
    choose = random.Random(1)
    lengths = [choose.randint(5, 200) for _ in range(64)]
    alone, shared = (list(micro_batches(range(64), lengths, 8, processes)) for processes in (1, 4))
    for parts in (alone, shared):
        assert sorted(itertools.chain(*parts)) == list(range(64))
        assert {len(part) for part in parts} == {8}
    for longer, shorter in itertools.pairwise(alone):
        assert min(lengths[i] for i in longer) >= max(lengths[i] for i in shorter)
    for start in (0, 4):
        sizes = [sum(lengths[i] for i in part) for part in shared[start : start + 4]]
        assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.parametrize(("count", "processes"), [(1, 2), (7, 1), (9, 2), (10, 2), (33, 3)])
def test_an_epoch_has_as_many_micro_batches_as_it_says(count: int, processes: int) -> None:
    sampler = StepSampler([5] * count, 4, 2, seed=1, shuffle=True, processes=processes)
    batches = list(sampler)
    assert len(batches) == len(sampler) == -(-count // 4)
    assert all(0 < len(batch) <= 4 for batch in batches)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", None),
        ("3", (3,)),
        ("0,2", (0, 2)),
        ("1-3", (1, 2, 3)),
        ("3;9", (3, 9)),
        ("-1", (11,)),
        ("2,2", (2,)),
    ],
)
def test_layers_are_named_in_several_ways(text: str, layers: tuple[int, ...] | None) -> None:
    assert parse_layers(text, 12) == layers


@pytest.mark.parametrize("text", ["", "12", "x", "3-1", "0,12", "-13"])
def test_layers_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(ClientError, match="layers"):
        parse_layers(text, 12)


def test_a_report_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="report_to 'no-such-board' is not installed"):
        train(BASE, Plan(SHAPE, report_to=("no-such-board",)), examples(4), tmp_path / "run")


def test_every_wrong_value_of_a_plan_is_told_at_once() -> None:
    plan = Plan(
        replace(SHAPE, rank=0, dropout=1.0),
        batch=0,
        warmup=-1.0,
        clip=-1.0,
        keep_states=float("nan"),
    )
    with pytest.raises(ClientError) as caught:
        plan.check()
    for name in ("rank", "dropout", "batch", "warm-up", "clip", "keep states"):
        assert name in str(caught.value)
