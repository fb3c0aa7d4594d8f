"""A request's life, from one token to the model's limit, with adapters: each answer against a
float64 reference.

The engine takes eight tokens a step, so prompts arrive in chunks that end anywhere, inside edited
prefixes and suffixes too. It runs in this process, so that a test can stop it between two steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.directory import Adapter, publish
from reft_serve.adapters.manifest import InterventionSpec, Manifest, Part
from reft_serve.interventions.positions import PositionRule
from tests.support.engine.engines import running_engine
from tests.support.engine.hooked_llama import HookedLlama
from tests.support.interventions.edit_cases import random_weights
from tests.support.paths import GOLDEN

TOLERANCE = 1e-3
LIMIT, CHUNK = 64, 8
RULES = {
    "halves": PositionRule("f7+l7", tied=False),
    "prefix": PositionRule("f11"),
    "suffix": PositionRule("l13", phase="all"),
    "answer": PositionRule("all", phase="generated"),
    "whole": PositionRule("all"),
    "at": PositionRule("0,5,-2", last_offset=1),
}
NAMES = [*RULES, None]


def write(path: Path, rule: PositionRule, seed: int) -> Adapter:
    """An edit at layers 0 and 2, and one at 1 for the suffix where it is untied."""
    last: Part = "both" if rule.tied else "suffix"
    specs = (
        InterventionSpec(layer=0, component="block_output", kind="loreft", rank=4, part="both"),
        InterventionSpec(layer=1, component="block_output", kind="consreft", rank=2, part=last),
        InterventionSpec(
            layer=2, component="block_output", kind="loreft", rank=3, activation="tanh", part="both"
        ),
    )
    weights = [
        random_weights(s.kind, 64, s.rank, s.activation, seed + k) for k, s in enumerate(specs)
    ]
    base = read_base_model(GOLDEN / "models" / "tiny-llama")
    return publish(path, Manifest(base_model=base, interventions=specs, positions=rule), weights)


@dataclass(frozen=True)
class Served:
    """An engine, its adapters and the reference."""

    engine: Any
    folder: Path
    adapters: dict[str, Adapter]
    reference: HookedLlama

    def lora(self, name: str | None) -> Any:
        from vllm.lora.request import LoRARequest

        return name and LoRARequest(name, list(RULES).index(name) + 1, str(self.folder / name))

    def ask(self, asked: Sequence[tuple[str | None, list[int]]], **params: Any) -> list[Any]:
        outputs: list[Any] = self.engine.generate(
            [{"prompt_token_ids": tokens} for _, tokens in asked],
            sampling(**params),
            lora_request=[self.lora(name) for name, _ in asked],
            use_tqdm=False,
        )
        return outputs

    def expected(self, name: str | None, prompt: list[int], answer: Sequence[int]) -> Tensor:
        return self.reference.logprobs(self.adapters[name] if name else None, prompt, answer)

    def check(
        self, name: str | None, prompt: list[int], answer: Any, *, greedy: bool = True
    ) -> None:
        """Every chosen token's logprob; where greedy, that no token was likelier."""
        expected = self.expected(name, prompt, answer.token_ids)[len(prompt) - 1 :]
        assert len(expected) == len(answer.token_ids) == len(answer.logprobs)
        for token, step, row in zip(answer.token_ids, answer.logprobs, expected, strict=True):
            assert step[token].logprob == pytest.approx(row[token].item(), abs=TOLERANCE), (
                name,
                len(prompt),
            )
            if greedy:
                assert row[token] >= row.max() - 2 * TOLERANCE, (name, len(prompt))

    @property
    def unfinished(self) -> dict[str, int]:
        """The versions that unfinished requests hold."""
        from reft_serve.engine.core.admission import admission_of

        admission = admission_of(self.engine.llm_engine.engine_core.engine_core)
        assert admission is not None
        return dict(admission._unfinished)


def sampling(**given: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        **({"temperature": 0.0, "max_tokens": 3, "ignore_eos": True, "logprobs": 1} | given)
    )


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Adapter]]:
    folder = tmp_path_factory.mktemp("adapters")
    return folder, {
        name: write(folder / name, rule, 10 * k) for k, (name, rule) in enumerate(RULES.items())
    }


@pytest.fixture(scope="module")
def served(adapters: tuple[Path, dict[str, Adapter]]) -> Iterator[Served]:
    options = {
        "max_model_len": LIMIT,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": CHUNK,
        "max_loras": 3,
    }
    with running_engine("tiny-llama", {"LORA": "off"}, **options) as engine:
        yield Served(engine, *adapters, HookedLlama())


def test_prompts_of_any_length_in_chunks_that_end_anywhere(served: Served) -> None:
    lengths = (1, 2, 3, 5, 7, 8, 9, 14, 15, 16, 17, 22, 23, 24, 25, 31, 32, 33, 47, 61)
    asked = [
        (name, prompt(length + k, length)) for k, name in enumerate(NAMES) for length in lengths
    ]
    outputs = served.ask(asked)
    for (name, tokens), output in zip(asked, outputs, strict=True):
        served.check(name, tokens, output.outputs[0])
    assert served.unfinished == {}


def test_the_edits_of_these_prompts_can_be_seen(served: Served) -> None:
    """Else the checks of this file could not fail."""
    for name in RULES:
        for length in (1, 2, 33):
            tokens = prompt(1, length)
            edited, base = (served.expected(n, tokens, [5, 6]) for n in (name, None))
            inert = length == 1 and name in ("prefix", "halves")  # half of one token is none
            assert ((edited - base).abs().max() > 0.01) == (not inert), (name, length)


@pytest.mark.parametrize("name", NAMES)
def test_one_token_ends_where_it_should(served: Served, name: str | None) -> None:
    (output,) = served.ask([(name, prompt(3, 20))], max_tokens=1)
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 1
    served.check(name, output.prompt_token_ids, output.outputs[0])


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_one_prompt_are_all_edited(served: Served, name: str | None) -> None:
    tokens = prompt(4, 35)
    (output,) = served.ask([(name, tokens)], n=4, temperature=1.0, max_tokens=6)
    assert len({tuple(answer.token_ids) for answer in output.outputs}) > 1
    for answer in output.outputs:
        served.check(name, tokens, answer, greedy=False)
    assert served.unfinished == {}


@pytest.mark.parametrize("name", NAMES)
def test_the_prompts_own_logprobs_are_those_of_the_edited_prompt(
    served: Served, name: str | None
) -> None:
    tokens = prompt(5, 45)
    # its blocks are in the cache, but the logprobs are not
    served.ask([(name, tokens), (None, tokens)])
    (output,) = served.ask([(name, tokens)], prompt_logprobs=1)
    expected = served.expected(name, tokens, output.outputs[0].token_ids)
    assert output.prompt_logprobs[0] is None
    for i, token in enumerate(tokens[1:]):
        given = output.prompt_logprobs[i + 1][token].logprob
        assert given == pytest.approx(expected[i, token].item(), abs=TOLERANCE), i
    served.check(name, tokens, output.outputs[0])


@pytest.mark.parametrize("name", ["halves", "suffix", "answer"])
def test_a_stop_string_ends_an_edited_answer(served: Served, name: str) -> None:
    tokens = prompt(6, 30)
    (whole,) = served.ask([(name, tokens)], max_tokens=20)
    text = whole.outputs[0].text
    stop = text[len(text) // 2 :][:3]
    (output,) = served.ask([(name, tokens)], max_tokens=20, stop=[stop])
    (answer,) = output.outputs
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.text == text[: text.index(stop)]
    assert list(answer.token_ids) == list(whole.outputs[0].token_ids[: len(answer.token_ids)])
    served.check(name, tokens, answer)
    assert served.unfinished == {}


@pytest.mark.parametrize("steps", [0, 1, 2, 6, 12])
def test_an_abort_while_prefilling_or_later_harms_nobody(served: Served, steps: int) -> None:
    """Requests of one adapter and of others are ended after so many steps; the rest answer as
    ever.
    """
    engine = served.engine.llm_engine
    asked = {f"{k}": (name, prompt(20 + k, 20 + k)) for k, name in enumerate([*NAMES, *NAMES])}
    for number, (name, tokens) in asked.items():
        engine.add_request(
            number, {"prompt_token_ids": tokens}, sampling(), lora_request=served.lora(name)
        )
    assert sum(served.unfinished.values()) == 2 * len(RULES)
    answers = {}

    def step() -> None:
        answers.update({output.request_id: output for output in engine.step() if output.finished})

    for _ in range(steps):
        step()
    ended = [number for number in asked if int(number) % 3 == 0 and number not in answers]
    assert ended
    engine.abort_request(ended)
    while engine.has_unfinished_requests():
        step()
    for number in asked.keys() - set(ended):
        served.check(*asked[number], answers[number].outputs[0])
    assert served.unfinished == {}


def test_a_seed_gives_the_same_answer_however_its_prompt_was_cut(served: Served) -> None:
    """Stock vLLM ends a CPU engine at the first chunk of a seeded prompt."""
    asked: list[tuple[str | None, list[int]]] = [
        (name, prompt(7, 29)) for name in (None, "halves", "whole")
    ]
    drawn = {"temperature": 1.5, "seed": 11, "max_tokens": 8}
    alone = [served.ask([each], **drawn)[0].outputs[0].token_ids for each in asked]
    together = [
        output.outputs[0].token_ids
        for output in served.ask([*asked, (None, prompt(8, 21)), *asked], **drawn)
    ]
    assert together[:3] == together[4:] == alone
    assert served.ask([asked[0]], **drawn | {"seed": 12})[0].outputs[0].token_ids != alone[0]


def test_a_prompt_at_the_models_limit_is_served_and_one_beyond_it_is_told_so(
    served: Served,
) -> None:
    from vllm.exceptions import VLLMValidationError

    for name in NAMES:
        tokens = prompt(7, LIMIT - 1)
        (output,) = served.ask([(name, tokens)], max_tokens=5)
        assert len(output.outputs[0].token_ids) == 1
        served.check(name, tokens, output.outputs[0])
        with pytest.raises(VLLMValidationError, match="maximum"):
            served.ask([(name, prompt(8, LIMIT + 1))])
    assert served.unfinished == {}
    (output,) = served.ask([("halves", prompt(9, 40))])
    served.check("halves", prompt(9, 40), output.outputs[0])


def test_beams_are_refused_with_an_adapter_and_searched_without(served: Served) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    prompts, params = (
        [{"prompt_token_ids": prompt(1, 9)}] * 2,
        BeamSearchParams(beam_width=2, max_tokens=3),
    )
    for given in (served.lora("suffix"), [None, served.lora("prefix")]):
        with pytest.raises(
            VLLMValidationError, match="beam search is not supported with a ReFT adapter"
        ):
            served.engine.beam_search(prompts, params, lora_request=given)
    assert len(served.engine.beam_search(prompts, params)) == 2


def test_a_generating_engine_refuses_to_embed(served: Served) -> None:
    with pytest.raises(ValueError, match="pooling"):
        served.engine.embed(
            [{"prompt_token_ids": prompt(1, 9)}], lora_request=served.lora("whole"), use_tqdm=False
        )


@pytest.fixture(scope="module")
def embedding(adapters: tuple[Path, dict[str, Adapter]]) -> Iterator[Served]:
    options = {
        "max_model_len": LIMIT,
        "max_num_batched_tokens": LIMIT,
        "max_num_seqs": CHUNK,
        "max_loras": 3,
    }
    with running_engine("tiny-llama", {"LORA": "off"}, runner="pooling", **options) as engine:
        yield Served(engine, *adapters, HookedLlama())


def test_embeddings_are_of_the_edited_prompt(embedding: Served) -> None:
    for _ in range(2):  # the second time from the cache
        for length in (1, 2, 9, 33, 50, LIMIT):
            tokens = prompt(10, length)
            outputs = embedding.engine.embed(
                [{"prompt_token_ids": tokens}] * len(NAMES),
                lora_request=[embedding.lora(name) for name in NAMES],
                use_tqdm=False,
            )
            for name, output in zip(NAMES, outputs, strict=True):
                state = embedding.reference.states(
                    embedding.adapters[name] if name else None, tokens
                )[-1]
                assert output.outputs.embedding == pytest.approx(
                    (state / state.norm()).tolist(), abs=1e-4
                ), name
