"""Which engine a request gets, and whose turn it is: the fleet over engines that are only
attributes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from reft_serve.errors import AdapterInvalid, EngineFailed, EngineUnavailable, NotFound, Overloaded
from reft_serve.gateway.engines.fleet import Fleet

pytestmark = pytest.mark.anyio
NOBODY: frozenset[Any] = frozenset()


class Engine:
    """What a fleet reads of an engine."""

    def __init__(self, number: int, refuses: Exception | None = None) -> None:
        self.name, self.url = f"engine-{number}", f"http://e{number}"
        self.healthy, self.draining = True, False
        self.refuses = refuses
        self.held: list[str] = []
        self.uses: Counter[str] = Counter()

    def __repr__(self) -> str:
        return self.name

    async def load(self, name: str, path: Path) -> None:
        if self.refuses:
            raise self.refuses
        self.held.append(name)

    async def unload(self, name: str) -> None:
        if name in self.held:
            self.held.remove(name)


class Members:
    """Engines that neither come nor go."""

    def __init__(self, *engines: Engine) -> None:
        self.engines = engines


def fleet_of(*engines: Engine, capacity: int = 4, queue_seconds: float = 5.0) -> Fleet:
    members: Any = Members(*engines)
    return Fleet(members, capacity, queue_seconds, 1.0)


class Requests:
    """Requests under way and in the queue; `turns` are those that got a place, in their order."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.turns: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def hold(
        self, stack: AsyncExitStack, tenant: str, affinity: str = "a", excluded: Any = NOBODY
    ) -> Engine:
        engine: Any = await stack.enter_async_context(self.fleet.engine(tenant, affinity, excluded))
        return engine  # type: ignore[no-any-return]

    async def queue(self, tenant: str, tokens: float = 10.0) -> None:
        """A request that is answered as soon as it has a place."""

        async def asking() -> None:
            async with self.fleet.engine(tenant, "a", NOBODY):
                self.turns.append(tenant)
                self.fleet.charge(tenant, tokens)

        self.tasks.append(asyncio.create_task(asking()))
        await asyncio.sleep(0)

    async def join(self) -> None:
        await asyncio.gather(*self.tasks)


async def test_requests_alike_go_to_one_engine_until_it_is_busier_than_the_rest() -> None:
    engines = [Engine(k) for k in range(3)]
    requests = Requests(fleet_of(*engines, capacity=100))
    homes = set()
    for _ in range(5):
        async with AsyncExitStack() as stack:
            homes.add(await requests.hold(stack, "t"))
    (home,) = homes
    async with AsyncExitStack() as stack:
        got = Counter([await requests.hold(stack, "t") for _ in range(30)])
    assert set(got) == set(engines)
    assert got[home] == max(got.values())
    assert 11 <= got[home] <= 13  # more than a third of thirty, by a quarter at most
    assert requests.fleet._reserved == Counter()


async def test_requests_that_differ_spread() -> None:
    requests = Requests(fleet_of(*(Engine(k) for k in range(3))))
    homes = set()
    for k in range(30):
        async with AsyncExitStack() as stack:
            homes.add(await requests.hold(stack, "t", f"version {k}"))
    assert len(homes) == 3


async def test_an_engine_that_failed_the_request_or_leaves_is_not_asked() -> None:
    failed, leaving, down, well = (Engine(k) for k in range(4))
    leaving.draining, down.healthy = True, False
    requests = Requests(fleet_of(failed, leaving, down, well))
    async with AsyncExitStack() as stack:
        for k in range(3):
            assert await requests.hold(stack, "t", str(k), frozenset({failed})) is well
    both: frozenset[Any] = frozenset({failed, well})
    with pytest.raises(EngineUnavailable):
        async with requests.fleet.engine("t", "a", both):
            pass
    well.healthy = failed.draining = False
    failed.healthy = False
    assert not requests.fleet.ready


async def test_a_full_fleet_lets_wait_and_then_refuses() -> None:
    requests = Requests(fleet_of(Engine(0), capacity=1, queue_seconds=0.02))
    async with AsyncExitStack() as stack:
        await requests.hold(stack, "one")
        with pytest.raises(Overloaded) as caught:
            async with requests.fleet.engine("two", "a", NOBODY):
                pass
        assert caught.value.retry_after > 0
        assert requests.fleet.waiting == 0
        waiting = asyncio.create_task(requests.hold(stack, "two"))
        await asyncio.sleep(0)
        assert requests.fleet.waiting == 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert requests.fleet.waiting == 0


async def test_one_tenant_gets_all_places_but_one() -> None:
    requests = Requests(fleet_of(Engine(0), capacity=8, queue_seconds=0.02))
    async with AsyncExitStack() as stack:
        for _ in range(7):
            await requests.hold(stack, "busy")
        with pytest.raises(Overloaded):
            await requests.hold(stack, "busy")
        await requests.hold(stack, "quiet")


async def test_who_has_had_least_work_is_next() -> None:
    requests = Requests(fleet_of(Engine(0), capacity=1))
    requests.fleet.charge("heavy", 1000)
    requests.fleet.charge("light", 10)
    async with AsyncExitStack() as stack:
        await requests.hold(stack, "other")
        for tenant in ("heavy", "heavy", "light", "light"):
            await requests.queue(tenant)
    await requests.join()
    assert requests.turns == ["light", "light", "heavy", "heavy"]


async def test_work_and_not_requests_is_shared_equally() -> None:
    requests = Requests(fleet_of(Engine(0), capacity=1))
    async with AsyncExitStack() as stack:
        await requests.hold(stack, "other")
        for _ in range(12):
            await requests.queue("long", tokens=300)
            await requests.queue("short", tokens=100)
    await requests.join()
    first = requests.turns[:12]
    assert 2 * first.count("long") < first.count("short")


async def test_who_was_away_has_saved_up_no_turns() -> None:
    requests = Requests(fleet_of(Engine(0), capacity=1))
    requests.fleet.charge("present", 1000)
    async with AsyncExitStack() as stack:
        await requests.hold(stack, "present")
        await requests.queue("present", tokens=100)
        for _ in range(3):
            await requests.queue("back", tokens=100)
    await requests.join()
    assert requests.turns.index("present") < 2


async def test_a_correction_is_charged_at_once() -> None:
    requests = Requests(fleet_of(Engine(0), capacity=1))
    requests.fleet.charge("one", 10)
    requests.fleet.charge("two", 20)
    requests.fleet.correct("one", 100)
    async with AsyncExitStack() as stack:
        await requests.hold(stack, "other")
        for tenant in ("one", "two"):
            await requests.queue(tenant)
    await requests.join()
    assert requests.turns == ["two", "one"]


async def test_a_caller_that_leaves_as_its_turn_comes_takes_no_place() -> None:
    requests = Requests(fleet_of(Engine(0), capacity=1))
    stack = AsyncExitStack()
    await requests.hold(stack, "one")
    leaving = asyncio.create_task(requests.hold(AsyncExitStack(), "two"))
    await asyncio.sleep(0)
    await stack.aclose()  # gives the place to `leaving`, which does not run before it is cancelled
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert requests.fleet._reserved == Counter()
    assert requests.fleet._held == Counter()
    async with asyncio.timeout(1), requests.fleet.engine("three", "a", NOBODY):
        pass


async def test_nothing_is_kept_of_tenants_and_engines_without_requests() -> None:
    requests = Requests(fleet_of(Engine(0), capacity=1))
    for k in range(3):
        await requests.queue(f"t{k}")
    await requests.join()
    fleet = requests.fleet
    assert [
        dict(kept) for kept in (fleet._queues, fleet._reserved, fleet._held, fleet._active)
    ] == [{}] * 4


async def test_a_version_is_in_every_engine_that_is_up_or_in_none(tmp_path: Path) -> None:
    engines = [Engine(0), Engine(1), Engine(2)]
    engines[2].healthy = False
    fleet = fleet_of(*engines)
    await fleet.load("v", tmp_path)
    assert [engine.held for engine in engines] == [["v"], ["v"], []]
    engines[1].refuses = AdapterInvalid("", ["no"])
    with pytest.raises(AdapterInvalid):
        await fleet.load("w", tmp_path)
    assert [engine.held for engine in engines] == [["v"], ["v"], []]


async def test_an_engine_that_cannot_load_lets_the_next_one_check(tmp_path: Path) -> None:
    engines = [Engine(0, EngineFailed("disk")), Engine(1)]
    await fleet_of(*engines).load("v", tmp_path)
    assert engines[1].held == ["v"]


async def test_an_adapter_that_ended_an_engine_is_not_given_to_the_next(tmp_path: Path) -> None:
    engines = [Engine(0, EngineUnavailable("gone", delivered=True)), Engine(1)]
    with pytest.raises(EngineUnavailable):
        await fleet_of(*engines).load("v", tmp_path)
    assert engines[1].held == []
    with pytest.raises(EngineUnavailable):
        await fleet_of().load("v", tmp_path)


async def test_a_version_in_use_is_unloaded_when_it_is_not(tmp_path: Path) -> None:
    engine = Engine(0)
    engine.held = ["v", "w"]
    engine.uses["v"] = 1
    fleet = fleet_of(engine)
    unloading = asyncio.create_task(fleet.unload("v", 60.0))
    await asyncio.sleep(0.01)
    assert engine.held == ["v", "w"]
    engine.uses.clear()
    await unloading
    assert engine.held == ["w"]
    engine.uses["w"] = 1
    await fleet.unload("w", 0.0)  # no patience left
    assert engine.held == []


async def test_an_engine_is_found_by_its_name() -> None:
    engine = Engine(0)
    named: Any = fleet_of(engine).named("engine-0")
    assert named is engine
    with pytest.raises(NotFound):
        fleet_of(engine).named("engine-1")
