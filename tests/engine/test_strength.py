"""A request's own factor on its adapter's edits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.directory import publish
from reft_serve.adapters.manifest import InterventionSpec, Manifest
from reft_serve.interventions.kinds import Weights
from reft_serve.interventions.positions import PositionRule
from tests.support.engine.engines import running_engine
from tests.support.paths import GOLDEN

PROMPT = [1, *range(10, 80)]
FACTORS = (1.0, 0.5, -2.0, 3.25)

Answer = tuple[list[int], list[float]]


def write(folder: Path, phase: Any) -> None:
    """A nodireft adapter, whose edit W2' (W h + b) is linear in W2, and the same with W2 times each
    factor.
    """
    random = torch.Generator().manual_seed(11)
    W, W2 = (0.3 * torch.randn(4, 64, generator=random) for _ in range(2))
    weights = Weights("nodireft", torch.randn(4, generator=random), W=W, W2=W2, b2=torch.zeros(4))
    specs = tuple(
        InterventionSpec(layer=k, component="block_output", kind="nodireft", rank=4) for k in (0, 2)
    )
    manifest = Manifest(
        base_model=read_base_model(GOLDEN / "models" / "tiny-llama"),
        interventions=specs,
        positions=PositionRule("f3+l3", phase=phase),
    )
    for factor in FACTORS:
        publish(folder / f"{phase}{factor}", manifest, [replace(weights, W2=factor * W2)] * 2)


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    folder = tmp_path_factory.mktemp("adapters")
    for phase in ("prompt", "all"):
        write(folder, phase)
    names = sorted(path.name for path in folder.iterdir())
    with running_engine("tiny-llama", {"LORA": "off"}, max_loras=8) as engine:

        def batch(
            requests: list[tuple[str | None, Any]], prompt: list[int] = PROMPT
        ) -> list[Answer]:
            params = [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=6,
                    ignore_eos=True,
                    logprobs=0,
                    extra_args=None if strength is None else {"reft_strength": strength},
                )
                for _, strength in requests
            ]
            adapters = [
                n and LoRARequest(n, names.index(n) + 1, str(folder / n)) for n, _ in requests
            ]
            prompts = [{"prompt_token_ids": prompt} for _ in requests]
            outputs = [
                o.outputs[0]
                for o in engine.generate(prompts, params, lora_request=adapters, use_tqdm=False)
            ]
            return [
                (
                    list(o.token_ids),
                    [step[t].logprob for step, t in zip(o.logprobs, o.token_ids, strict=True)],
                )
                for o in outputs
            ]

        yield batch


@pytest.mark.parametrize("phase", ["prompt", "all"])
def test_each_request_of_a_batch_has_its_own_strength(ask: Any, phase: str) -> None:
    given = ask([(f"{phase}1.0", factor) for factor in FACTORS] + [(None, None)])
    trained = ask([(f"{phase}{factor}", None) for factor in FACTORS] + [(None, None)], PROMPT)
    for (tokens, logprobs), (expected_tokens, expected) in zip(given, trained, strict=True):
        assert tokens == expected_tokens
        assert logprobs == pytest.approx(expected, abs=1e-4)
    assert len({tuple(logprobs) for _, logprobs in given}) == len(given)


def test_strength_0_is_the_base_model_bit_for_bit(ask: Any) -> None:
    prompt = [1, *range(100, 140)]
    base, zero, minus_zero = ask([(None, None), ("all1.0", 0), ("prompt1.0", -0.0)], prompt)
    assert base == zero == minus_zero


def test_strengths_share_no_edited_block_of_the_prefix_cache(ask: Any) -> None:
    prompt = [1, *range(30, 130)]
    alone = [ask([("prompt1.0", factor)], prompt)[0] for factor in FACTORS]
    again = [ask([("prompt1.0", factor)], prompt)[0] for factor in reversed(FACTORS)]
    for (tokens, logprobs), (expected_tokens, expected) in zip(again[::-1], alone, strict=True):
        assert tokens == expected_tokens
        assert logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("strength", ["strong", True, float("nan"), float("inf"), 101, [1.0]])
def test_a_strength_that_is_no_factor_is_refused(ask: Any, strength: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(
        VLLMValidationError, match="reft_strength must be a number from -100 to 100"
    ):
        ask([("prompt1.0", strength)])


def test_a_strength_without_a_reft_adapter_is_refused(ask: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="names no ReFT adapter"):
        ask([(None, 0.5)])
