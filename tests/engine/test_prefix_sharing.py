"""The prefix cache: what adapters share, what they must not, seen through `num_cached_tokens` and
the answers.
"""

from __future__ import annotations

from collections.abc import Iterator
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

RULES = {
    "l1": ("l1", 1),
    "l5": ("l5", 2),
    "l5other": ("l5", 3),
    "f2": ("f2", 4),
    "f2l2": ("f2+l2", 5),
    "all": ("all", 6),
}
BLOCK = 32


def write(path: Path, positions: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    R = torch.linalg.qr(torch.randn(64, 4, generator=random))[0].mT
    weights = Weights(
        "loreft", torch.randn(4, generator=random), R=R, W=torch.randn(4, 64, generator=random)
    )
    spec = InterventionSpec(layer=1, component="block_output", kind="loreft", rank=4)
    base = read_base_model(GOLDEN / "models" / "tiny-llama")
    publish(
        path,
        Manifest(base_model=base, interventions=(spec,), positions=PositionRule(positions)),
        [weights],
    )


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    folder = tmp_path_factory.mktemp("adapters")
    for name, (positions, seed) in RULES.items():
        write(folder / name, positions, seed)
    with running_engine("tiny-llama", {"LORA": "off"}, max_loras=8) as engine:

        def once(
            name: str | None, tokens: list[int], *, salt: str | None = None
        ) -> tuple[int, list[float]]:
            """One request alone: (cached tokens, logprobs of its first answers)."""
            number = 0 if name is None else list(RULES).index(name) + 1
            adapter = None if name is None else LoRARequest(name, number, str(folder / name))
            params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=0)
            prompt = {"prompt_token_ids": tokens} | ({"cache_salt": salt} if salt else {})
            (output,) = engine.generate([prompt], params, lora_request=adapter, use_tqdm=False)
            (answer,) = output.outputs
            chosen = [
                step[token].logprob
                for step, token in zip(answer.logprobs, answer.token_ids, strict=True)
            ]
            return output.num_cached_tokens, chosen

        yield once


def prompt(seed: int, length: int = 100) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_adapters_that_edit_the_suffix_share_the_base_models_prefix(ask: Any) -> None:
    tokens = prompt(1)
    assert ask(None, tokens)[0] == 0
    assert ask("l1", tokens)[0] == 3 * BLOCK
    # token 95 is edited, so the third block is the adapter's own
    assert ask("l5", tokens)[0] == 2 * BLOCK
    assert ask("l5other", tokens)[0] == 2 * BLOCK


def test_what_an_adapter_computed_before_its_first_edit_serves_the_base(ask: Any) -> None:
    tokens = prompt(2)
    assert ask("l5", tokens)[0] == 0
    assert ask(None, tokens)[0] == 2 * BLOCK


def test_an_edited_prefix_is_the_versions_own_and_shared_by_its_prompts(ask: Any) -> None:
    tokens = prompt(3)
    assert ask(None, tokens)[0] == 0
    assert ask("f2", tokens)[0] == 0
    assert ask("f2", [*tokens[:70], 9, 9, 9])[0] == 2 * BLOCK
    assert ask("f2l2", tokens)[0] == 0
    assert ask("f2l2", [*tokens[:90], 7])[0] == 2 * BLOCK


@pytest.mark.parametrize("name", [*RULES, None])
def test_growing_prompts_answer_as_if_nothing_were_cached(ask: Any, name: str | None) -> None:
    tokens = prompt(4, 120)
    for length in (33, 64, 65, 96, 97, 120, 64, 34, 120):
        _, cached = ask(name, tokens[:length])
        hit, fresh = ask(name, tokens[:length], salt=f"{name}-{length}-{torch.rand(()).item()}")
        assert hit == 0
        assert cached == pytest.approx(fresh, abs=1e-3)
