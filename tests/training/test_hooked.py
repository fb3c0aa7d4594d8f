"""The hooked model: packed, padded and one by one it gives the same log-probabilities and the same gradients."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from reft_serve.interventions.modules import Intervention
from reft_serve.interventions.positions import Part, PositionRule
from reft_serve.training.data.batching import collate
from reft_serve.training.data.examples import IGNORED, Example
from reft_serve.training.model.edited_model import Edit, EditedModel
from tests.support.engine.family_models import FAMILIES
from tests.support.paths import GOLDEN
from tests.support.training.models import learnt

RULES = [PositionRule("f3+l3", tied=False), PositionRule("all", phase="all"), PositionRule("0,-1")]


def edited(name: str, rule: PositionRule) -> EditedModel:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_pretrained(GOLDEN / "models" / name, dtype=torch.float32)
    config = lm.config.get_text_config()
    parts = [Part.PREFIX] if rule.tied else list(Part)
    layers = range(config.num_hidden_layers)
    return EditedModel(
        lm,
        [
            Edit(layer, part, Intervention("loreft", config.hidden_size, 3))
            for part in parts
            for layer in layers
        ],
    )


def examples() -> list[Example]:
    choose, found = random.Random(2), []
    for prompt_len, length in ((9, 14), (1, 6), (9, 14), (30, 33), (4, 4), (10, 12), (90, 92)):
        ids = tuple(choose.randint(3, 255) for _ in range(length))
        found.append(Example(ids, (IGNORED,) * prompt_len + ids[prompt_len:], prompt_len))
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.spec}-{rule.phase}")
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
# With the longest prompt few tokens have a loss, and the last layer looks from those alone.
@pytest.mark.parametrize("longest", [[], [6]], ids=["many", "few"])
def test_however_examples_are_laid_out(name: str, rule: PositionRule, longest: list[int]) -> None:
    model = edited(name, rule)
    # Three of about one length, which share a call of attention; the last example has no token with a loss.
    batch = [examples()[i] for i in (*longest, 0, 5, 2, 3, 1, 4)]
    padded = learnt(model, collate(batch, rule, packed=False))
    # One by one, transformers' own whole forward on the edited layers.
    single = torch.cat([_whole(model, example, rule) for example in batch])
    assert model.can_pack(100)
    packed = learnt(model, collate(batch, rule, packed=True))
    assert torch.allclose(padded[0], single, atol=2e-5)
    assert torch.allclose(packed[0], single, atol=2e-5)
    for mine, theirs in zip(packed[1], padded[1], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def _whole(model: EditedModel, example: Example, rule: PositionRule) -> Tensor:
    """All logits of one example, by a fresh model with plain hooks on every layer and nothing left out."""
    lm = AutoModelForCausalLM.from_pretrained(model.lm.config._name_or_path, dtype=torch.float32)
    layers = lm.transformer.h if hasattr(lm, "transformer") else lm.model.layers
    for e in model.edits:
        rows = [
            i for span in rule.spans(example.prompt_len) if span.part == e.part
            for i in range(span.start, min(span.stop, len(example.input_ids)))
        ]  # fmt: skip

        def hook(_m: object, _i: object, h: Tensor, e: Edit = e, rows: list[int] = rows) -> Tensor:
            out = h.clone()
            out[:, rows] = e.module(h[:, rows])
            return out

        layers[e.layer].register_forward_hook(hook)
    logprobs = lm(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
    pairs = [(t - 1, label) for t, label in enumerate(example.labels) if t and label != IGNORED]
    return torch.tensor([logprobs[t, label].item() for t, label in pairs])


def test_hits_are_the_targets_that_were_the_likeliest() -> None:
    model = edited("tiny-llama", RULES[0])
    batch = collate(examples(), RULES[0], packed=False)
    likeliest = torch.stack([model._logits(batch).argmax(1), batch.target_ids])
    every_second = torch.arange(len(batch.target_ids)) % 2
    model(replace(batch, target_ids=likeliest.gather(0, every_second[None])[0]))
    assert model.hits == (every_second == 0).sum() > 0


def test_a_window_shorter_than_the_examples_is_not_packed() -> None:
    model = edited("tiny-llama", RULES[0])
    model.lm.config.sliding_window = 16
    assert not model.can_pack(40)
    assert model.can_pack(12)


def test_only_the_interventions_learn() -> None:
    model = edited("tiny-llama", RULES[0])
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning
    assert all(name.startswith("interventions.") for name in learning)
    assert not model.lm.training


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_out_changes_no_familys_answers(name: str, tmp_path: Path) -> None:
    FAMILIES[name].build(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    width, vocabulary = (
        getattr(plain.config.get_text_config(), key) for key in ("hidden_size", "vocab_size")
    )
    model = EditedModel(
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
        [Edit(1, Part.PREFIX, Intervention("loreft", width, 3))],
    )
    some = []
    for each in examples()[:3]:
        ids = tuple(i % vocabulary for i in each.input_ids)
        some.append(
            Example(ids, (IGNORED,) * each.prompt_len + ids[each.prompt_len :], each.prompt_len)
        )
    expected = []
    for each in some:
        with torch.no_grad():
            logprobs = plain(torch.tensor([each.input_ids])).logits[0].log_softmax(-1)
        expected += [
            logprobs[t - 1, each.input_ids[t]] for t in range(each.prompt_len, len(each.input_ids))
        ]
    got = model.base_score(collate(some, PositionRule("f1"), packed=model.can_pack(64)))
    assert torch.allclose(got, torch.stack(expected), atol=1e-4)
