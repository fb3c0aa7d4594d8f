"""Tokens that an n-gram drafter guessed, taken back or kept, change no answer: edits and cached
blocks are as without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reft_serve.interventions.positions import PositionRule
from tests.support.engine.engines import running_engine
from tests.support.engine.golden_check import TOLERANCE, check_golden, golden_cases
from tests.support.engine.loreft_edits import write_loreft

RULES = {
    "prompt": PositionRule("f3+l3"),
    "prefix": PositionRule("f3"),
    "all tokens": PositionRule("all", phase="all"),
    "prompt and answer": PositionRule("l2", phase="all"),
    "answer": PositionRule("f1", phase="generated"),
}
# Answers in few words repeat themselves, so that about half of what is guessed is right.
WORDS = [30, 40, 41, 42]
PROMPTS = [[1, *([20 + i, 30, 40 + i] * 6)] for i in range(4)] + [[1, *range(60, 90)]]
# Of the allowed words alone, so that the logprobs of four tokens are all there are.
MODE = "processed_logprobs"
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}

Answer = list[tuple[int, float, float]]


class Conversation:
    """Two turns with each adapter: PROMPTS, then each prompt with its answer and a word more."""

    def __init__(self, engine: Any, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        adapters = [None] + [
            LoRARequest(name, i + 1, str(folder / name)) for i, name in enumerate(RULES)
        ]
        self.keys = [
            (adapter and adapter.lora_name, i) for adapter in adapters for i in range(len(PROMPTS))
        ]
        wanted = [adapter for adapter in adapters for _ in PROMPTS]
        first = [PROMPTS[i] for _, i in self.keys]
        self.first, _ = _answers(engine, first, wanted, "one")
        second = [
            [*p, *(token for token, *_ in answer), 7]
            for p, answer in zip(first, self.first, strict=True)
        ]
        self.second, self.cached = _answers(engine, second, wanted, "one")
        self.fresh, _ = _answers(engine, second, wanted, "two")


def _answers(
    engine: Any, prompts: list[list[int]], adapters: list[Any], salt: str
) -> tuple[list[Answer], list[int]]:
    """Of each request: (token, its logprob, the likeliest word's lead over the next) of each step,
    and its cached tokens.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_tokens=40,
        ignore_eos=True,
        allowed_token_ids=WORDS,
        logprobs=len(WORDS),
        detokenize=False,
    )
    wanted = [{"prompt_token_ids": prompt, "cache_salt": salt} for prompt in prompts]
    outputs = engine.generate(wanted, params, lora_request=adapters, use_tqdm=False)
    answers = []
    for output in outputs:
        (answer,) = output.outputs
        steps = []
        for token, step in zip(answer.token_ids, answer.logprobs, strict=True):
            best = sorted((step[word].logprob for word in WORDS), reverse=True)
            steps.append((token, step[token].logprob, best[0] - best[1]))
        answers.append(steps)
    return answers, [output.num_cached_tokens for output in outputs]


def largest_difference(mine: list[Answer], other: list[Answer]) -> float:
    """Of logprobs, up to where two tokens are as likely as each other and either may be chosen."""
    worst, compared = 0.0, 0
    for number, (answer, expected) in enumerate(zip(mine, other, strict=True)):
        for step, (got, wanted) in enumerate(zip(answer, expected, strict=True)):
            if got[0] != wanted[0]:
                assert wanted[2] < 2 * TOLERANCE, (
                    f"answer {number}: token {step} is {got[0]}, not {wanted[0]}"
                )
                break
            worst, compared = max(worst, abs(got[1] - wanted[1])), compared + 1
    assert compared > 0.9 * sum(map(len, other)), "too many ties to tell"
    return worst


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    for seed, (name, rule) in enumerate(RULES.items()):
        write_loreft(path / name, [(1, "block_output"), (2, "mlp_output")], rule, seed)
    return path


@pytest.fixture(scope="module")
def plain(folder: Path) -> Conversation:
    with running_engine("tiny-llama", {"LORA": "off"}, logprobs_mode=MODE) as engine:
        return Conversation(engine, folder)


@pytest.fixture(scope="module")
def drafting(plain: Conversation) -> Iterator[Any]:
    options: dict[str, Any] = {
        "logprobs_mode": MODE,
        "disable_log_stats": False,
        "max_num_seqs": 32,
    }
    with running_engine(
        "tiny-llama", core_process=True, speculative_config=NGRAM, **options
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def spoken(drafting: Any, folder: Path) -> Conversation:
    return Conversation(drafting, folder)


def test_guesses_change_no_answer(plain: Conversation, spoken: Conversation, drafting: Any) -> None:
    from vllm.v1.metrics.reader import Counter

    for turn in ("first", "second", "fresh"):
        worst = largest_difference(getattr(spoken, turn), getattr(plain, turn))
        print(f"{turn}: largest logprob difference {worst:.2g}")
        assert worst < TOLERANCE
    counted = {
        metric.name: metric.value
        for metric in drafting.get_metrics()
        if isinstance(metric, Counter)
    }
    drafted, kept = (
        counted["vllm:spec_decode_num_draft_tokens"],
        counted["vllm:spec_decode_num_accepted_tokens"],
    )
    print(f"{drafted} guesses, {kept} of them right")
    assert kept > 200
    assert drafted - kept > 200


def test_blocks_with_guessed_tokens_are_right_when_they_are_used_again(
    spoken: Conversation,
) -> None:
    assert largest_difference(spoken.second, spoken.fresh) < TOLERANCE
    reused = {
        key: cached
        for key, cached in zip(spoken.keys, spoken.cached, strict=True)
        if key[0] in (None, "prefix")
    }
    # a block of 32 that ends among generated tokens, since PROMPTS are shorter
    assert min(reused.values()) >= 32


def test_guesses_or_not_a_mixed_batch_gives_what_pyreft_gives(
    drafting: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cases = golden_cases("tiny-llama", tmp_path_factory.mktemp("golden"), lora=True)
    kinds = ("base", "_all", "_decode", "_f5l5", "plus_lora")
    check_golden(drafting, {name: case for name, case in cases.items() if name.endswith(kinds)})
