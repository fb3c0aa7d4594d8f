"""One model over two ranks, by tensors and by layers: every rank's share of the edits, and what
fails on some ranks only.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from reft_serve.adapters.directory import Adapter
from reft_serve.engine.configuration import check_modes
from reft_serve.errors import AdapterUnsupported, EngineUnsupported
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import Component
from tests.support.adapters.damage import write_good
from tests.support.engine.engines import engine_config, running_engine
from tests.support.engine.golden_check import TOLERANCE, check_golden, golden_cases
from tests.support.engine.loreft_edits import EDITS, PROMPT, by_hooks, write_loreft
from tests.support.engine.server import Server

ARMS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "tensors": ({}, {"tensor_parallel_size": 2}),
    "layers": ({}, {"pipeline_parallel_size": 2}),
}


def one_memory_node(patch: pytest.MonkeyPatch) -> None:
    """Left alone, vLLM gives each rank a memory node of its own, and there may be only one."""
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    patch.setenv("OMP_NUM_THREADS", "1")


@contextmanager
def two_ranks(settings: dict[str, str], **options: Any) -> Iterator[Any]:
    """An engine over two processes."""
    with pytest.MonkeyPatch.context() as patch:
        one_memory_node(patch)
        with running_engine(
            "tiny-llama",
            settings,
            core_process=True,
            max_num_batched_tokens=64,
            max_num_seqs=64,
            **options,
        ) as engine:
            yield engine


# First, before there is an engine of the module beside it.
@pytest.mark.slow
def test_two_engines_serve_an_adapter_that_is_loaded_while_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_memory_node(monkeypatch)
    adapter = write_loreft(tmp_path / "late", EDITS["everywhere"], PositionRule("f2+l2"), 0)
    server = Server(tmp_path, "--data-parallel-size", "2", ready_seconds=500)
    try:
        client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60
        )

        def first(model: str, rank: int) -> float:
            """The first answer's logprob, from one of the engines."""
            header = {"X-data-parallel-rank": str(rank)}
            answer = client.completions.create(
                model=model,
                prompt=PROMPT,
                max_tokens=1,
                temperature=0,
                logprobs=1,
                extra_headers=header,
            )
            assert answer.choices[0].logprobs is not None
            assert answer.choices[0].logprobs.token_logprobs is not None
            return answer.choices[0].logprobs.token_logprobs[0]

        both = (0, 1)
        expected = pytest.approx(by_hooks(None).max().item(), abs=TOLERANCE)
        assert [first("base", rank) for rank in both] == [expected, expected]
        assert server.load("late", tmp_path / "late")[0] == 200
        expected = pytest.approx(by_hooks(adapter).max().item(), abs=TOLERANCE)
        assert [first("late", rank) for rank in both] == [expected, expected]
        with pytest.raises(openai.BadRequestError, match="data_parallel_rank 2 is out of range"):
            first("late", 2)  # so there are two, and the header chose between them
    finally:
        server.stop()


def request(name: str, path: Path, number: int = 1) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(path))


def first_logprobs(engine: Any, wanted: list[Any]) -> list[dict[int, float]]:
    """The likeliest first answers to PROMPT with each adapter, in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=10)
    prompts = [{"prompt_token_ids": PROMPT}] * len(wanted)
    outputs = engine.generate(prompts, params, lora_request=wanted, use_tqdm=False)
    return [
        {token: entry.logprob for token, entry in o.outputs[0].logprobs[0].items()} for o in outputs
    ]


def ending(engine: Any, adapter: Any) -> str:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    (output,) = engine.generate(
        [{"prompt_token_ids": PROMPT}], params, lora_request=[adapter], use_tqdm=False
    )
    return str(output.outputs[0].finish_reason)


@pytest.fixture(scope="module", params=ARMS)
def engine(request: Any) -> Iterator[Any]:
    settings, options = ARMS[request.param]
    with two_ranks(settings, **options) as running:
        yield running


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Adapter]]:
    folder = tmp_path_factory.mktemp("adapters")
    paths = {name: folder / name.replace(" ", "-").replace(",", "") for name in EDITS}
    return {
        name: (paths[name], write_loreft(paths[name], places, PositionRule("f2+l2"), seed))
        for seed, (name, places) in enumerate(EDITS.items())
    }


def test_two_ranks_give_what_pyreft_gives(
    engine: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_golden(engine, golden_cases("tiny-llama", tmp_path_factory.mktemp("golden"), lora=True))


def test_an_edit_acts_wherever_its_rank_is(
    engine: Any, adapters: dict[str, tuple[Path, Adapter]]
) -> None:
    names = [None, *adapters]
    found = first_logprobs(
        engine, [None if name is None else request(name, adapters[name][0]) for name in names]
    )
    worst = 0.0
    for name, mine in zip(names, found, strict=True):
        expected = by_hooks(None if name is None else adapters[name][1])
        differences = [abs(expected[token].item() - logprob) for token, logprob in mine.items()]
        worst = max(worst, *differences)
        assert max(differences) < TOLERANCE, name
        if name is not None:
            assert (
                max(abs(found[0].get(token, -99) - logprob) for token, logprob in mine.items())
                > 0.1
            )
    print(f"largest logprob difference {worst:.2g}")


def test_every_rank_loads_and_unloads_the_same_versions(
    engine: Any, adapters: dict[str, tuple[Path, Adapter]]
) -> None:
    front = engine.llm_engine
    before = engine.collective_rpc("reft_stats")
    assert len(before) == 2
    wanted = {
        101 + i: request(f"again {name}", path, 101 + i)
        for i, (name, (path, _)) in enumerate(adapters.items())
    }
    for adapter in wanted.values():
        assert front.add_lora(adapter)
    assert wanted.keys() <= front.list_loras()
    loaded = engine.collective_rpc("reft_stats")
    assert {stats["resident"] for stats in loaded} == {loaded[0]["resident"]}
    # An idle engine of a data-parallel group steps along with the others; its adapters stay.
    engine.collective_rpc("execute_dummy_batch")
    assert [stats["resident"] for stats in engine.collective_rpc("reft_stats")] == [
        stats["resident"] for stats in loaded
    ]
    for number in wanted:
        assert front.remove_lora(number)
    assert not wanted.keys() & front.list_loras()
    for stats, now in zip(loaded, engine.collective_rpc("reft_stats"), strict=True):
        assert now["resident"] == stats["resident"] - len(wanted)


def test_a_version_that_cannot_be_read_fails_its_request_alone(engine: Any, tmp_path: Path) -> None:
    from reft_serve.engine.front_end.binding import binder_of

    whole = first_logprobs(engine, [None])
    for number in (201, 202):
        path = tmp_path / f"gone{number}"
        write_good(path, number)
        gone = request(path.name, path, number)
        # its files vanish between the check and the loading
        binder_of(engine.llm_engine).bind(gone)
        shutil.rmtree(path)
        assert ending(engine, gone) == "error"
        with pytest.raises(Exception, match="gone"):
            engine.llm_engine.add_lora(gone)
        # Were an answer of the second rank left over, these would read it as their own.
        assert len(engine.collective_rpc("reft_stats")) == 2
        assert all("steps" in stats for stats in engine.collective_rpc("reft_stats"))
        assert first_logprobs(engine, [None])[0] == pytest.approx(whole[0], abs=TOLERANCE)
    good = tmp_path / "good"
    write_good(good, 3)
    assert ending(engine, request("good", good, 203)) == "length"


def test_an_adapter_with_too_much_on_one_rank_is_refused_before_any_rank_is_asked(
    engine: Any, tmp_path: Path
) -> None:
    places: list[tuple[int, Component]] = [
        *((2, "attention_output"), (2, "mlp_output"), (2, "block_output")),
        *((3, "attention_output"), (3, "mlp_output"), (3, "block_output")),
    ]
    write_loreft(tmp_path / "lopsided", places, PositionRule("l1"), 0)
    lopsided = request("lopsided", tmp_path / "lopsided", 301)
    if engine.llm_engine.vllm_config.parallel_config.pipeline_parallel_size == 1:
        assert engine.llm_engine.add_lora(lopsided)
        return
    with pytest.raises(
        AdapterUnsupported,
        match=r"6 of its interventions are on one rank .* raise REFT_MAX_INTERVENTIONS",
    ):
        engine.llm_engine.add_lora(lopsided)


def test_micro_batches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config()
    check_modes(config)
    monkeypatch.setattr(config.parallel_config, "ubatch_size", 2)
    with pytest.raises(
        EngineUnsupported, match="dual batch overlap: leave out --enable-dbo and --ubatch-size"
    ):
        check_modes(config)
