"""The judge of a prefix cache: an engine with it, an engine without, and what must be equal.

It also knows, from the position rules alone, which blocks hold the same edits of the same tokens,
and holds `num_cached_tokens` to that from both sides: nothing else may be shared, and all of that
must be.
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

from reft_serve.interventions.positions import Part, PositionRule
from tests.support.engine.engines import running_engine
from tests.support.engine.prefix_cases import (
    CONTEXT,
    LONGEST_ANSWER,
    MAX_RANK,
    STEMS,
    Ask,
    Recipe,
    Work,
    works,
)

TOLERANCE = 1e-3
BLOCK = 32

# A block's content: salt, all tokens up to its end, and their edits: digest, strength, edited
# tokens with their parts.
Content = tuple[str | None, tuple[int, ...], tuple[Any, ...]]


@dataclass
class Tally:
    """What was run so far, and how much the cache did in it."""

    works: int = 0
    requests: int = 0
    adapters: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    shared_across_adapters: int = 0
    edited_hits: int = 0
    answer_hits: int = 0
    salted_hits: int = 0
    scaled_hits: int = 0
    ended_hits: int = 0
    near_ties: int = 0
    compared: int = 0
    largest_difference: float = 0.0


@dataclass(frozen=True)
class Request:
    """One request as the engines get it."""

    ask: Ask
    tokens: tuple[int, ...]
    adapter: int
    rule: PositionRule | None
    digest: str | None
    prior: int

    @property
    def prompt_tokens(self) -> int:
        return (
            len(self.tokens)
            if self.ask.end is None
            else max(int(self.ask.end * len(self.tokens)), 1)
        )

    def contents(self, tokens: tuple[int, ...], count: int) -> list[Content]:
        """The first `count` blocks of the prompt and what follows it."""
        return [
            (self.ask.salt, tokens[:end], self._edits(end))
            for end in range(BLOCK, (count + 1) * BLOCK, BLOCK)
        ]

    def _edits(self, end: int) -> tuple[Any, ...]:
        if self.rule is None or self.ask.strength == 0:
            return ()
        length = self.prompt_tokens
        prefix, suffix = self.rule.indices(length) if self.rule.phase != "generated" else ([], [])
        later = range(length, end) if self.rule.edits_generated else range(0)
        edits = [(i, Part.PREFIX) for i in (*prefix, *later)] + [(i, Part.SUFFIX) for i in suffix]
        inside = tuple(sorted(edit for edit in edits if edit[0] < end))
        return (self.digest, self.ask.strength, inside) if inside else ()


@dataclass
class Judge:
    """Two engines and a folder for adapters."""

    cached: Any
    plain: Any
    folder: Path
    tally: Tally = field(default_factory=Tally)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def judge(self, work: Work) -> None:
        """Run the work on both engines.

        Raises:
            AssertionError: an answer differs, or the cache shared what it must not or did not share
                what it could.
        """
        assert self.cached.reset_prefix_cache()
        folder = self.folder / "work"
        adapters = [_Written.of(recipe, folder, next(self._numbers)) for recipe in work.recipes]
        try:
            self._judge(work, adapters)
        finally:
            shutil.rmtree(folder)
        self.tally.works += 1
        self.tally.adapters += len(adapters)

    def _judge(self, work: Work, adapters: Sequence[_Written]) -> None:
        done: list[tuple[Request, Any]] = []
        known: dict[Content, int] = {}
        for wave in work.waves:
            requests = [_request(ask, adapters, done) for ask in wave]
            outputs = _generate(self.cached, requests, adapters)
            self._check_sharing(requests, outputs, known)
            done += zip(requests, outputs, strict=True)
        expected = _generate(self.plain, [request for request, _ in done], adapters)
        for (request, output), plain in zip(done, expected, strict=True):
            assert plain.num_cached_tokens == 0
            self._compare(request, output.outputs[0], plain.outputs[0])

    def _check_sharing(
        self, requests: list[Request], outputs: list[Any], known: dict[Content, int]
    ) -> None:
        before, wave = dict(known), Counter[Content]()
        for request, output in zip(requests, outputs, strict=True):
            tokens = request.tokens + tuple(output.outputs[0].token_ids)
            for content in request.contents(tokens, (len(tokens) - 1) // BLOCK):
                known.setdefault(content, request.adapter)
                wave[content] += 1
        for request, output in zip(requests, outputs, strict=True):
            blocks = request.contents(request.tokens, (len(request.tokens) - 1) // BLOCK)
            least = sum(1 for _ in itertools.takewhile(before.__contains__, blocks))
            # At most what others of its own wave have computed too.
            most = sum(
                1
                for _ in itertools.takewhile(
                    lambda block: block in before or wave[block] > 1, blocks
                )
            )
            hit, left = divmod(output.num_cached_tokens, BLOCK)
            assert not left
            assert least <= hit <= most, f"{hit} blocks cached of {least} to {most}: {request}"
            self._note(request, blocks[: min(hit, least)], hit * BLOCK, before)

    def _note(
        self, request: Request, hits: list[Content], cached: int, owners: dict[Content, int]
    ) -> None:
        tally = self.tally
        tally.requests += 1
        tally.prompt_tokens += len(request.tokens)
        tally.cached_tokens += cached
        tally.shared_across_adapters += any(owners[content] != request.adapter for content in hits)
        edited = any(content[2] for content in hits)
        tally.edited_hits += edited
        tally.scaled_hits += edited and request.ask.strength != 1
        tally.ended_hits += edited and request.ask.end is not None
        tally.answer_hits += cached > request.prior > 0
        tally.salted_hits += bool(hits) and request.ask.salt is not None

    def _compare(self, request: Request, answer: Any, plain: Any) -> None:
        for step, (ours, theirs) in enumerate(zip(answer.logprobs, plain.logprobs, strict=True)):
            for token in ours.keys() & theirs.keys():
                difference = abs(ours[token].logprob - theirs[token].logprob)
                assert difference <= TOLERANCE, (
                    f"logprob off by {difference:.3g} at token {step} of {request}"
                )
                self.tally.largest_difference = max(self.tally.largest_difference, difference)
                self.tally.compared += 1
            mine, other = answer.token_ids[step], plain.token_ids[step]
            if mine != other:  # two tokens as likely as each other: what follows is another text
                assert theirs[other].logprob - theirs[mine].logprob <= 2 * TOLERANCE, request
                self.tally.near_ties += 1
                return


def judge_random(
    judge: Judge, requests: int, widest: int = 24, first_seed: int = 0
) -> Iterator[Tally]:
    """Judge random works of waves up to `widest` until there were so many requests; the tally after
    every 20 works.

    Raises:
        AssertionError: as `Judge.judge` does, with the smallest work that shows the fault.
    """
    for number in itertools.count(first_seed):
        if judge.tally.requests >= requests:
            return

        @seed(number)
        @settings(
            max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(works(widest))
        def check(work: Work) -> None:
            judge.judge(work)

        check()
        yield judge.tally


@dataclass(frozen=True)
class _Written:
    recipe: Recipe
    digest: str
    number: int
    path: Path

    @classmethod
    def of(cls, recipe: Recipe, folder: Path, number: int) -> _Written:
        path = folder / str(number)
        return cls(recipe, recipe.write(path), number, path)


def _request(ask: Ask, adapters: Sequence[_Written], done: list[tuple[Request, Any]]) -> Request:
    number, tokens, prior = ask.adapter, STEMS[ask.stem][: ask.length], 0
    if ask.follows is not None and done:
        earlier, output = done[ask.follows % len(done)]
        prior = len(earlier.tokens)
        tokens = earlier.tokens + tuple(output.outputs[0].token_ids) + tokens[: ask.length % 40]
        if number is None:
            number, ask = (
                earlier.adapter,
                replace(ask, strength=earlier.ask.strength, salt=earlier.ask.salt),
            )
    number = -1 if number is None else number
    written = None if number < 0 else adapters[number]
    rule, digest = (written.recipe.rule, written.digest) if written else (None, None)
    return Request(ask, tokens[: CONTEXT - LONGEST_ANSWER], number, rule, digest, prior)


def _generate(engine: Any, requests: list[Request], adapters: Sequence[_Written]) -> list[Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    loras = [None if r.adapter < 0 else adapters[r.adapter] for r in requests]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=r.ask.max_tokens,
            ignore_eos=True,
            logprobs=4,
            detokenize=False,
            extra_args=_extra_args(r),
        )
        for r in requests
    ]
    prompts = [
        {"prompt_token_ids": list(r.tokens)} | ({"cache_salt": r.ask.salt} if r.ask.salt else {})
        for r in requests
    ]
    outputs: list[Any] = engine.generate(
        prompts,
        params,
        lora_request=[
            a and LoRARequest(f"adapter{a.number}", a.number, str(a.path)) for a in loras
        ],
        use_tqdm=False,
    )
    return outputs


def _extra_args(request: Request) -> dict[str, Any] | None:
    if request.adapter < 0:
        return None
    strength = {} if request.ask.strength == 1 else {"reft_strength": request.ask.strength}
    end = {} if request.ask.end is None else {"reft_prompt_tokens": request.prompt_tokens}
    return strength | end or None


@contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """A judge with its engines: steps, batches and slots of different sizes, so that nothing but
    the answers is equal.
    """
    from vllm.config import KVEventsConfig

    shared: dict[str, Any] = {
        "max_model_len": CONTEXT,
        "hf_overrides": {"max_position_embeddings": CONTEXT},
        "block_size": BLOCK,
    }
    events = KVEventsConfig(
        enable_kv_cache_events=True, publisher="zmq", endpoint=f"ipc://{folder}/events"
    )
    mine = {
        "max_loras": 3,
        "max_num_seqs": 48,
        "max_num_batched_tokens": 512,
        "kv_events_config": events,
    }
    others = {"max_loras": 64, "max_num_seqs": 64, "enable_prefix_caching": False}
    settings = {"LORA": "off", "MAX_RANK": str(MAX_RANK)}
    with (
        running_engine("tiny-llama", settings, **shared, **mine) as cached,
        running_engine("tiny-llama", settings, **shared, **others) as plain,
    ):
        yield Judge(cached, plain, folder)
