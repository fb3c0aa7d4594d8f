"""Preemption: requests that lose their cache half-way answer as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reft_serve.adapters.manifest import InterventionSpec
from reft_serve.interventions.positions import PositionRule
from tests.support.engine.engines import running_engine, stats
from tests.support.engine.prefix_cases import Recipe

TOLERANCE = 1e-3
RULES = (
    PositionRule("f3+l3"),
    PositionRule("l5", phase="all"),
    PositionRule("all", phase="generated"),
    PositionRule("f5+l2", tied=False),
    PositionRule("all"),
    PositionRule("l1"),
)
# 13 blocks of 32 tokens for requests that take up to four each; two slots for six adapters.
PRESSED: dict[str, Any] = {"num_gpu_blocks_override": 14, "max_loras": 2, "max_num_seqs": 12}

Answers = list[tuple[list[int], list[float]]]


def ask(engine: Any, folder: Path) -> Answers:
    """The same 84 requests, whatever the engine: each adapter and the base, prompts of one to three
    blocks.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    chance = random.Random(5)
    adapters = [
        None,
        *(LoRARequest(f"a{k}", k + 1, str(folder / f"a{k}")) for k in range(len(RULES))),
    ]
    lengths = [chance.randrange(20, 75) for _ in range(12 * len(adapters))]
    prompts = [{"prompt_token_ids": chance.choices(range(3, 300), k=length)} for length in lengths]
    outputs = engine.generate(
        prompts,
        SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True, logprobs=0),
        lora_request=[adapters[i % len(adapters)] for i in range(len(prompts))],
        use_tqdm=False,
    )
    answers = [output.outputs[0] for output in outputs]
    return [
        (list(a.token_ids), [s[t].logprob for s, t in zip(a.logprobs, a.token_ids, strict=True)])
        for a in answers
    ]


def preemptions(engine: Any) -> int:
    """As vLLM's own metrics count them."""
    (count,) = (
        metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions"
    )
    return int(count)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    specs = tuple(
        InterventionSpec(layer=k, component="block_output", kind="loreft", rank=4) for k in (0, 2)
    )
    for k, rule in enumerate(RULES):
        Recipe(rule, specs, 10 * k).write(folder / f"a{k}")
    return folder


@pytest.fixture(scope="module")
def unpressed(folder: Path) -> Iterator[Answers]:
    with running_engine("tiny-llama", {"LORA": "off"}, enable_prefix_caching=False) as engine:
        yield ask(engine, folder)


@pytest.mark.parametrize("cache", [False, True])
def test_preempted_requests_answer_as_if_they_had_not_been(
    folder: Path, unpressed: Answers, cache: bool
) -> None:
    options = PRESSED | {
        "enable_prefix_caching": cache,
        "disable_log_stats": False,
    }
    with running_engine("tiny-llama", {"LORA": "off"}, **options) as engine:
        pressed = ask(engine, folder)
        forced, evictions = preemptions(engine), stats(engine)["evictions"]
    print(f"{forced} preemptions, {evictions} evictions, prefix cache {'on' if cache else 'off'}")
    assert forced >= 20
    assert evictions >= len(RULES)  # adapters went and came back between
    for (tokens, logprobs), (expected_tokens, expected) in zip(pressed, unpressed, strict=True):
        assert tokens == expected_tokens
        assert logprobs == pytest.approx(expected, abs=TOLERANCE)
