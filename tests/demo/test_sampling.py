"""The demo model, sampled and trained with edits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from reft_serve.adapters.directory import read_adapter
from reft_serve.demo import train
from reft_serve.demo.behaviours import ADAPTERS, BEHAVIOURS, MODEL
from reft_serve.demo.sampling import Sampler, SamplerEdits
from reft_serve.interventions.positions import PositionRule

PROMPTS = (
    "Once upon a time, there was a girl.",
    "Tom went out.",
    "One day, a boy and his mom went to the big park.",
)


@pytest.fixture(scope="module")
def model() -> Sampler:
    return Sampler(MODEL)


def shipped(name: str) -> SamplerEdits:
    return SamplerEdits.of(read_adapter(ADAPTERS / name))


def greedy(model: Sampler, prompts: Sequence[str], adapter: SamplerEdits | None) -> list[str]:
    answers = model.sample([model.tokens(p, prompt=True) for p in prompts], 24, 0, 1e-4, adapter)
    return [model.text(answer) for answer in answers]


def test_a_mask_holds_the_rules_tokens_after_the_padding() -> None:
    mask = SamplerEdits((), PositionRule("f2+l1", tied=False)).mask([4, 6]).int().tolist()
    assert mask == [
        [[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1]],
    ]


def test_without_an_adapter_the_model_is_the_base(model: Sampler) -> None:
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = torch.tensor([model.tokens(PROMPTS[0], prompt=True)])
    expected = plain.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    greedy(model, PROMPTS, shipped("birds"))  # leaves nothing behind
    assert greedy(model, PROMPTS[:1], None) == [model.text(expected.tolist())]


@pytest.mark.parametrize("name", [behaviour.name for behaviour in BEHAVIOURS])
def test_an_answer_does_not_depend_on_the_padding_beside_it(model: Sampler, name: str) -> None:
    adapter = shipped(name)
    together = greedy(model, PROMPTS, adapter)
    assert together == [greedy(model, [prompt], adapter)[0] for prompt in PROMPTS]
    assert together != greedy(model, PROMPTS, None)


@pytest.mark.slow
def test_training_again_gives_an_adapter_as_good_as_the_shipped_one(tmp_path: Path) -> None:
    train.main(["speech", "--out", str(tmp_path)])
    again, ours = (read_adapter(place / "speech").manifest for place in (tmp_path, ADAPTERS))
    assert again.model_dump(exclude={"provenance"}) == ours.model_dump(exclude={"provenance"})
    rates = [manifest.provenance["rate"] for manifest in (again, ours)]
    assert all(isinstance(rate, float) and rate > 0.9 for rate in rates)


def test_training_refuses_to_write_over_an_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["speech"])
    assert "already exists" in capsys.readouterr().err
