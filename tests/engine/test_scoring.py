"""Scoring an answer: the tokens before `reft_prompt_tokens` are the prompt, as if the rest had been generated."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reft_serve.adapters.directory import Adapter, read_adapter
from reft_serve.adapters.manifest import InterventionSpec
from reft_serve.interventions.positions import PositionRule
from tests.support.engine.engines import running_engine
from tests.support.engine.hooked_llama import HookedLlama
from tests.support.engine.prefix_cases import Recipe

RULES = (
    PositionRule("l1"), PositionRule("f3+l3"), PositionRule("f5+l2", tied=False), PositionRule("l4", last_offset=1),
    PositionRule("all"), PositionRule("f40"), PositionRule("0,2,-2"), PositionRule("l2", phase="all"),
    PositionRule("all", phase="generated"),
)  # fmt: skip
TOKENS = [1, *random.Random(3).choices(range(3, 300), k=69)]
ENDS = (69, 33, 20, 5, 1)


class Scorer:
    """An engine, and the same adapters in plain Hugging Face with hooks."""

    def __init__(self, engine: Any, folder: Path) -> None:
        self.engine, self.reference = engine, HookedLlama()
        self.paths = [folder / str(k) for k in range(len(RULES))]
        self.adapters: list[Adapter] = [read_adapter(path, 1 << 20) for path in self.paths]

    def generate(
        self, adapter: int, prompt_tokens: Any, tokens: list[int] = TOKENS, **options: Any
    ) -> Any:
        return self.batch([(adapter, prompt_tokens)], tokens, **options)[0]

    def batch(
        self, asks: list[tuple[int, Any]], tokens: list[int] = TOKENS, **options: Any
    ) -> list[Any]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        given = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "logprobs": 0} | options
        params = [
            SamplingParams(**given, extra_args=None if end is None else {"reft_prompt_tokens": end})
            for _, end in asks
        ]
        loras = [
            None if k < 0 else LoRARequest(f"a{k}", k + 1, str(self.paths[k])) for k, _ in asks
        ]
        prompts = [{"prompt_token_ids": tokens} for _ in asks]
        outputs: list[Any] = self.engine.generate(
            prompts, params, lora_request=loras, use_tqdm=False
        )
        return outputs

    def expected(self, adapter: int, end: int) -> list[float]:
        found = self.reference.logprobs(
            None if adapter < 0 else self.adapters[adapter], TOKENS[:end], TOKENS[end:]
        )
        return [float(found[i - 1, TOKENS[i]]) for i in range(1, len(TOKENS))]


def scores(output: Any) -> list[float]:
    return [
        step[token].logprob
        for step, token in zip(output.prompt_logprobs[1:], TOKENS[1:], strict=True)
    ]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scorer]:
    """Its steps hold 48 tokens, so that a prompt comes in pieces that end anywhere."""
    folder = tmp_path_factory.mktemp("adapters")
    specs = tuple(
        InterventionSpec(layer=k, component="block_output", kind="loreft", rank=4) for k in (0, 2)
    )
    for k, rule in enumerate(RULES):
        Recipe(rule, specs, 10 * k).write(folder / str(k))
    options = {
        "max_loras": 4,
        "max_num_batched_tokens": 48,
        "max_num_seqs": 16,
    }
    with running_engine("tiny-llama", {"LORA": "off"}, **options) as engine:
        yield Scorer(engine, folder)


def test_scores_are_those_of_hooks_at_the_prompts_positions(scorer: Scorer) -> None:
    asks = [(k, end) for k in range(len(RULES)) for end in ENDS] + [(-1, None), (-1, 20)]
    for (k, end), output in zip(asks, scorer.batch(asks), strict=True):
        assert scores(output) == pytest.approx(scorer.expected(k, end or len(TOKENS)), abs=1e-3), (
            k,
            end,
        )


def test_without_the_prompts_end_the_edits_are_at_the_answers(scorer: Scorer) -> None:
    plain = scores(scorer.generate(0, None))
    assert plain == pytest.approx(scorer.expected(0, len(TOKENS)), abs=1e-3)
    assert max(abs(a - b) for a, b in zip(plain, scorer.expected(0, 20), strict=True)) > 0.1


def test_a_cached_block_serves_only_those_with_the_same_end(scorer: Scorer) -> None:
    """A request without prompt logprobs reads the cache, and its next token follows from every edit before."""
    for _ in range(2):
        for k in range(len(RULES)):
            for end in ENDS:
                (answer,) = scorer.generate(k, end, prompt_logprobs=None).outputs
                (token,) = answer.token_ids
                found = scorer.reference.logprobs(
                    scorer.adapters[k], TOKENS[:end], [*TOKENS[end:], token]
                )
                assert answer.logprobs[0][token].logprob == pytest.approx(
                    float(found[-1, token]), abs=1e-3
                ), (k, end)


def test_scoring_an_answer_gives_what_generating_it_gave(scorer: Scorer) -> None:
    for k in range(len(RULES)):
        (said,) = scorer.generate(k, None, TOKENS[:20], max_tokens=12, ignore_eos=True).outputs
        whole = [*TOKENS[:20], *said.token_ids]
        scored = scorer.generate(k, 20, whole).prompt_logprobs[20:]
        for token, given, step in zip(said.token_ids, said.logprobs, scored, strict=True):
            assert step[token].logprob == pytest.approx(given[token].logprob, abs=1e-3)


@pytest.mark.parametrize("end", [0, -1, 71, True, 2.0, "20", [], [20, 20], float("nan")])
def test_an_end_that_is_none_is_refused(scorer: Scorer, end: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="reft_prompt_tokens"):
        scorer.generate(0, end)
