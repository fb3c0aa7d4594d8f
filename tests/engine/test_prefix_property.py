"""The prefix cache: no answer depends on it, whatever adapters, prompts and requests come, and what
can be shared is.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from reft_serve.adapters.manifest import InterventionSpec
from reft_serve.interventions.positions import PositionRule
from tests.support.engine.prefix_cases import STEMS, Recipe
from tests.support.engine.prefix_judge import BLOCK, TOLERANCE, Judge, judge_random, judging

REQUESTS = 1200


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    with judging(tmp_path_factory.mktemp("adapters")) as judge:
        yield judge


def test_no_request_differs_from_its_run_without_a_cache(judge: Judge) -> None:
    for _ in judge_random(judge, REQUESTS):
        pass
    tally = judge.tally
    print(tally)
    assert tally.requests >= REQUESTS
    # Else it would prove little: the cache must have worked, in every way that it is there for.
    assert tally.cached_tokens >= 0.25 * tally.prompt_tokens
    for hits in (
        "shared_across_adapters",
        "edited_hits",
        "answer_hits",
        "salted_hits",
        "scaled_hits",
    ):
        assert getattr(tally, hits) >= 0.01 * tally.requests, hits
    assert tally.ended_hits >= 0.005 * tally.requests
    assert tally.near_ties <= 0.01 * tally.requests


Answer = tuple[int, list[int], list[float]]


def recipe(positions: str, seed: int) -> Recipe:
    specs = tuple(
        InterventionSpec(layer=k, component="block_output", kind="loreft", rank=4) for k in (0, 2)
    )
    return Recipe(PositionRule(positions), specs, seed)


def lora(path: Path, number: int, **more: Any) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(path.name, number, str(path), **more)


def sampling() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=0)


def ask(engine: Any, adapter: Any, *lengths: int) -> list[Answer]:
    """Prompts of one stem, one after the other: (cached tokens, answer, its logprobs)."""
    return [
        _answer(
            engine.generate(prompt(length), sampling(), lora_request=adapter, use_tqdm=False)[0]
        )
        for length in lengths
    ]


def prompt(length: int) -> Any:
    return {"prompt_token_ids": list(STEMS[0][:length])}


def _answer(output: Any) -> Answer:
    (answer,) = output.outputs
    chosen = [
        step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)
    ]
    return output.num_cached_tokens, list(answer.token_ids), chosen


def same(answers: list[Answer], expected: list[Answer]) -> bool:
    return all(
        a[1] == b[1] and a[2] == pytest.approx(b[2], abs=TOLERANCE)
        for a, b in zip(answers, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("positions", "hits"),
    [
        # 20, 26, 39, 39, 40 and 20 tokens are edited, from the first on: half the prompt, but at
        # most 40.
        ("f40", [0, 0, 0, 2, 1, 1]),
        # The same, to the last: from token 20, 26, 39, 40, 50 and 20 on. Two prompts share what
        # lies before both.
        ("l40", [0, 0, 0, 1, 1, 1]),
    ],
)
def test_halves_of_short_prompts_share_no_more_than_what_both_edit_alike(
    judge: Judge, positions: str, hits: list[int]
) -> None:
    judge.cached.reset_prefix_cache()
    path, lengths = judge.folder / f"short{positions}", (40, 52, 78, 79, 90, 40)
    recipe(positions, 5).write(path)
    answers = ask(judge.cached, lora(path, 930), *lengths)
    assert same(answers, ask(judge.plain, lora(path, 930), *lengths))
    assert [cached // BLOCK for cached, _, _ in answers] == hits


def test_a_name_loaded_anew_never_serves_what_it_cached_before(judge: Judge) -> None:
    judge.cached.reset_prefix_cache()
    lengths, name = (70, 100, 130), judge.folder / "name"
    versions = {seed: judge.folder / f"version{seed}" for seed in (1, 2)}
    expected = {}
    for seed, path in versions.items():
        recipe("f3+l3", seed).write(path)
        expected[seed] = ask(judge.plain, lora(path, 900 + seed), *lengths)
    assert not same(expected[1], expected[2])

    def load(seed: int) -> Any:
        shutil.rmtree(name, ignore_errors=True)
        shutil.copytree(versions[seed], name)
        return lora(name, 900, load_inplace=True)

    for loads, seed in enumerate((1, 2, 1)):
        first = ask(judge.cached, load(seed), *lengths)
        again = ask(judge.cached, lora(name, 900), *lengths)
        assert same(first, expected[seed])
        assert same(again, expected[seed])
        # the first version, back again, finds its own blocks
        assert first[0][0] == (0 if loads < 2 else 2 * BLOCK)
        assert [cached for cached, _, _ in again] == [2 * BLOCK, 3 * BLOCK, 4 * BLOCK]


def test_a_request_under_way_keeps_its_version_when_the_name_is_loaded_anew(judge: Judge) -> None:
    judge.cached.reset_prefix_cache()
    engine, name = judge.cached.llm_engine, judge.folder / "moving"
    expected = []
    for seed in (3, 4):
        shutil.rmtree(name, ignore_errors=True)
        recipe("l3", seed).write(name)
        expected += ask(judge.plain, lora(name, 910 + seed), 200)
        engine.add_request(
            str(seed), prompt(200), sampling(), lora_request=lora(name, 910, load_inplace=True)
        )
    answers = {}
    while engine.has_unfinished_requests():
        answers.update(
            {output.request_id: _answer(output) for output in engine.step() if output.finished}
        )
    assert same([answers["3"], answers["4"]], expected)
    assert not same([answers["3"]], [answers["4"]])


def test_kv_events_carry_the_keys_that_the_cache_goes_by(judge: Judge) -> None:
    l5, f2 = (judge.folder / positions for positions in ("l5", "f2"))
    digests = [recipe(path.name, seed).write(path) for seed, path in enumerate((l5, f2))]
    with listening(judge) as stored:
        ask(judge.cached, None, 100)
        base = stored()
        ask(judge.cached, lora(l5, 920), 100)
        suffix = stored()
        ask(judge.cached, lora(f2, 921), 100)
        prefix = stored()
    assert [keys for _, _, keys in base] == [None] * 3
    # Of 100 tokens, 95 to 99 are edited: the first two blocks are the base's and are not stored
    # again.
    ((hash_, parent, keys),) = suffix
    assert parent == base[1][0]
    assert hash_ != base[2][0]
    assert digests[0] in keys[0]
    assert len(prefix) == 3
    assert digests[1] in prefix[0][2][0]
    assert [keys for _, _, keys in prefix[1:]] == [None] * 2  # told apart by their parent
    assert not {h for h, _, _ in base} & {h for h, _, _ in prefix}


@contextmanager
def listening(judge: Judge) -> Iterator[Any]:
    """Subscribe, and give the blocks stored since the last look: (hash, parent, extra keys)."""
    from vllm.distributed.kv_events import KVEventBatch

    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.connect(f"ipc://{judge.folder}/events")
    socket.subscribe(b"")
    decoder = msgspec.msgpack.Decoder(KVEventBatch)

    def stored() -> list[tuple[Any, Any, Any]]:
        blocks = []
        while socket.poll(500):
            for event in decoder.decode(socket.recv_multipart()[-1]).events:
                if type(event).__name__ == "BlockStored":
                    parents = [event.parent_block_hash, *event.block_hashes]
                    keys = event.extra_keys or [None] * len(event.block_hashes)
                    blocks += zip(event.block_hashes, parents, keys, strict=False)
        return blocks

    time.sleep(0.2)  # a subscription takes a moment to arrive
    judge.cached.reset_prefix_cache()
    stored()
    try:
        yield stored
    finally:
        socket.close(linger=0)
