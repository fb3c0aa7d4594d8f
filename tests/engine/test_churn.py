"""Many adapters through few slots: nothing leaks, nothing is read twice, nothing is lost, and no
old version is served.
"""

from __future__ import annotations

import argparse
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_serve.adapters.directory import Adapter
from reft_serve.adapters.manifest import MAX_PASSES, EngineLimits
from reft_serve.engine.adapter_ref import AdapterRef
from reft_serve.engine.front_end.binding import Binder
from reft_serve.engine.worker.edits import Edits
from reft_serve.engine.worker.registry import Registry
from reft_serve.interventions.batched import UnitPool
from reft_serve.interventions.kinds import fold
from reft_serve.interventions.positions import Part
from tests.support.adapters.damage import write_good
from tests.support.engine import churn
from tests.support.engine.engines import running_engine, stats

SLOTS = 3
OPERATIONS = ["load", "load", "load", "remove", "pin", "hold", "release"]
PLACES = {(2, "block"): 0, (2, "mlp_output"): 1}
PROMPT = [1, *range(20, 100)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Adapter]]:
    folder = tmp_path_factory.mktemp("adapters")
    return [(folder / str(i), write_good(folder / str(i), seed=i)) for i in range(6)]


def registry_of(base: Any) -> tuple[Registry, Edits]:
    pool = UnitPool(SLOTS * 2, 8, 64)
    edits = Edits(
        pool, torch.zeros(len(PLACES), MAX_PASSES, SLOTS * len(Part), dtype=torch.int32), 64
    )
    limits = EngineLimits(max_rank=8, max_interventions=2)
    return Registry(edits, SLOTS, PLACES, range(4), base, limits, 1 << 20), edits


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 5)), min_size=30, max_size=60)
)
def test_whatever_the_order_every_slot_holds_its_adapter_and_no_file_is_read_again(
    adapters: list[tuple[Path, Adapter]], operations: list[tuple[str, int]]
) -> None:
    registry, edits = registry_of(adapters[0][1].manifest.base_model)
    resident: dict[int, int] = {}
    held: set[int] = set()
    for operation, i in operations:
        path, adapter = adapters[i]
        identity = AdapterRef(adapter.digest, adapter.manifest.positions)
        found = "/nowhere" if i in resident or i in held else str(path)
        match operation:
            case "load":
                slot = registry.slot_of(identity, found, ())
                resident = {k: s for k, s in resident.items() if s != slot} | {i: slot}
            case "remove":
                assert registry.remove(identity.engine_id) == (
                    [identity.digest] if i in resident else []
                )
                resident.pop(i, None)
            case "pin":
                assert registry.pin(identity.engine_id) == (i in resident)
            case "hold":
                registry.hold(identity, found, None)
                held.add(i)
            case "release":
                registry.release(identity.digest)
                held.discard(i)
        assert len(registry) == len(resident)
        table = edits.units_of_LCS.reshape(len(PLACES), MAX_PASSES, SLOTS, len(Part))[:, 0, :, 0]
        assert sorted(table[table > 0].tolist()) == sorted(set(table[table > 0].tolist()))
        assert int((table > 0).sum()) == 2 * len(resident)
        for k, slot in resident.items():
            for place, weights in enumerate(adapters[k][1].weights):
                found_unit, expected = edits.pool.read(int(table[place, slot])), fold(weights)
                assert torch.equal(found_unit.A, expected.A)
                assert torch.equal(found_unit.b, expected.b)
                assert torch.equal(found_unit.B, expected.B)
                assert (found_unit.activation, found_unit.activated) == (
                    expected.activation,
                    expected.activated,
                )


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with running_engine("tiny-llama", {"LORA": "off"}, max_loras=2, max_cpu_loras=2) as running:
        yield running


def ask(engine: Any, adapter: Any, *, salt: str | None = None) -> tuple[int, list[float]]:
    """One request alone: (cached tokens, logprobs of its answer)."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=0)
    prompt = {"prompt_token_ids": PROMPT} | ({"cache_salt": salt} if salt else {})
    (output,) = engine.generate([prompt], params, lora_request=adapter, use_tqdm=False)
    (answer,) = output.outputs
    chosen = [
        step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)
    ]
    return output.num_cached_tokens, chosen


def adapter_at(path: Path, seed: int, number: int) -> Any:
    from vllm.lora.request import LoRARequest

    write_good(path, seed)
    return LoRARequest(path.name, number, str(path))


@pytest.fixture(autouse=True)
def empty(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test finds the engine without adapters."""
    yield
    if "engine" in request.fixturenames:
        core = request.getfixturevalue("engine").llm_engine
        for number in core.list_loras():
            core.remove_lora(number)


def test_unloading_gives_the_slot_back_also_of_a_pinned_adapter(
    engine: Any, tmp_path: Path
) -> None:
    core, evictions = engine.llm_engine, stats(engine)["evictions"]
    for number in range(1, 9):
        core.add_lora(adapter_at(tmp_path / f"a{number}", number, number))
        assert number in core.list_loras()
        assert core.pin_lora(number)
        assert core.remove_lora(number)
        assert not core.list_loras()
        assert stats(engine)["resident"] == 0
    assert stats(engine)["evictions"] == evictions


def test_what_is_loaded_needs_no_file_for_its_first_request_nor_after_it_lost_its_slot(
    engine: Any, tmp_path: Path
) -> None:
    core, adapters = engine.llm_engine, [adapter_at(tmp_path / f"a{n}", n, n) for n in (10, 11, 12)]
    for adapter in adapters:  # two slots
        core.add_lora(adapter)
        shutil.rmtree(adapter.lora_path)
    answers = [ask(engine, adapter)[1] for adapter in adapters]
    for n, answer in zip((10, 11, 12), answers, strict=True):
        fresh = adapter_at(tmp_path / f"again{n}", n, 10 * n)
        assert ask(engine, fresh, salt=f"fresh{n}")[1] == pytest.approx(answer, abs=1e-4)


def test_a_pinned_adapter_stays_while_others_come_and_go_and_its_files_are_not_read_again(
    engine: Any, tmp_path: Path
) -> None:
    core, pinned = engine.llm_engine, adapter_at(tmp_path / "pinned", 20, 20)
    core.add_lora(pinned)
    assert core.pin_lora(20)
    expected = ask(engine, pinned)[1]
    shutil.rmtree(tmp_path / "pinned")
    for number in range(21, 27):
        ask(engine, adapter_at(tmp_path / f"a{number}", number, number))
        assert 20 in core.list_loras()
    assert ask(engine, pinned, salt="fresh")[1] == pytest.approx(expected, abs=1e-4)


def test_new_weights_under_the_same_name_and_path_are_served_and_no_old_cache(
    engine: Any, tmp_path: Path
) -> None:
    core, path = engine.llm_engine, tmp_path / "same"
    answers: list[list[float]] = []
    for seed in (30, 31, 32):
        shutil.rmtree(path, ignore_errors=True)
        adapter = adapter_at(path, seed, 30)
        adapter.load_inplace = True
        core.add_lora(adapter)
        cached, logprobs = ask(engine, adapter)
        # its first tokens are edited, so not a block may come from the version before
        assert cached == 0
        assert ask(engine, adapter)[0] > 0
        elsewhere = adapter_at(tmp_path / f"elsewhere{seed}", seed, 100 + seed)
        assert logprobs == pytest.approx(ask(engine, elsewhere, salt=f"fresh{seed}")[1], abs=1e-4)
        assert all(logprobs != pytest.approx(other, abs=1e-3) for other in answers)
        answers.append(logprobs)


def test_a_version_that_is_resident_under_another_name_is_not_loaded_again(
    engine: Any, tmp_path: Path
) -> None:
    core, first, copy = (
        engine.llm_engine,
        adapter_at(tmp_path / "first", 40, 40),
        adapter_at(tmp_path / "copy", 40, 41),
    )
    core.add_lora(first)
    loads = stats(engine)["loads"]
    core.add_lora(copy)
    expected = ask(engine, first)[1]
    shutil.rmtree(tmp_path / "copy")
    assert ask(engine, copy, salt="fresh")[1] == pytest.approx(expected, abs=1e-4)
    assert stats(engine)["loads"] == loads


def test_a_directory_that_vanishes_before_it_is_loaded_costs_nobody_anything(
    engine: Any, tmp_path: Path
) -> None:
    core, stays, goes = (
        engine.llm_engine,
        adapter_at(tmp_path / "stays", 50, 50),
        adapter_at(tmp_path / "goes", 51, 51),
    )
    expected = ask(engine, stays)[1]
    before = stats(engine)
    shutil.rmtree(tmp_path / "goes")
    with pytest.raises(Exception, match="goes"):
        core.add_lora(goes)
    assert {name: stats(engine)[name] for name in ("loads", "evictions", "resident")} == {
        name: before[name] for name in ("loads", "evictions", "resident")
    }
    assert ask(engine, stays, salt="fresh")[1] == pytest.approx(expected, abs=1e-4)


def test_a_churn_from_many_sides_loses_no_request_and_keeps_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"adapters": 60, "slots": 8, "loads": 1200, "callers": 4, "clients": 12}
    args = argparse.Namespace(**sizes, rank=4, seed=0)
    for name, value in churn.environment(args).items():
        monkeypatch.setenv(name, value)
    result = churn.run(args, tmp_path)
    assert result["requests"] > 300
    assert set(result["operations"]) == set(churn.MIX)
    assert (result["lost"], result["lost_first"]) == (0, [])
    assert (result["unexpected"], result["unexpected_first"]) == (0, [])
    assert result["wrong"] == 0
    end = result["memory_end"]
    assert end["front_end_entries"] <= end["known"] + sizes["clients"]
    # Slots, units, residents, pins, the tensors of unfinished and of idle versions, and the times
    # of recent loads.
    assert end["worker_entries"] < 300
    assert end["core_entries"] < 4 * (sizes["slots"] + sizes["clients"])


def test_adapters_can_be_listed_while_threads_bind_others() -> None:
    config: Any = None
    binder, done = Binder(config), threading.Event()

    def bind() -> None:
        number = 0
        while not done.is_set():
            number += 1
            bound: Any = SimpleNamespace(request=SimpleNamespace(lora_int_id=number))
            binder._bound[number % 5000] = binder._bound[number % 5000 + 10_000] = bound
            binder.forget(number % 4999)

    thread = threading.Thread(target=bind)
    thread.start()
    try:
        for _ in range(200):
            binder.front_end_ids([1, 2, 3])
    finally:
        done.set()
        thread.join()
