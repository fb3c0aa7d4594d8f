"""Whose turn it is at an engine, without HTTP."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

from reft_serve.gateway.engines.discovery import Discovery
from reft_serve.gateway.engines.engine import Engine
from reft_serve.gateway.engines.fleet import Fleet


def test_a_tenant_that_is_behind_gets_what_it_lacks_and_no_more() -> None:
    """Answers of 100 tokens, six places, and a tenant that lacks three answers: the rest is shared
    out.
    """

    async def shares() -> Counter[str]:
        members = Discovery(("http://127.0.0.1:9",), None)
        await members.refresh()
        (engine,) = members.engines
        engine.healthy = True
        fleet = Fleet(members, 6, 5.0, 5.0)
        got: Counter[str] = Counter()
        ending = asyncio.Event()

        async def ask(tenant: str) -> None:
            async with fleet.engine(tenant, "base", frozenset[Engine]()):
                got[tenant] += 1
                await ending.wait()

        async with AsyncExitStack() as others:
            for _ in range(6):
                await others.enter_async_context(fleet.engine("other", "base", frozenset[Engine]()))
            asked = [asyncio.create_task(ask(tenant)) for tenant in ("behind", "ahead") * 8]
            await asyncio.sleep(0)
            for _ in range(20):
                fleet.charge("behind", 100)
                fleet.charge("ahead", 100)
            fleet.charge("ahead", 300)
            assert fleet.waiting == 16
        await asyncio.sleep(0.01)
        found = Counter(got)
        ending.set()
        await asyncio.gather(*asked)
        await fleet.close()
        return found

    assert asyncio.run(shares()) in ({"behind": 4, "ahead": 2}, {"behind": 5, "ahead": 1})


def test_versions_are_shared_out_evenly_and_keep_their_engines_when_one_leaves() -> None:
    async def homes(count: int) -> list[str]:
        members = Discovery(tuple(f"http://127.0.0.1:{port}" for port in range(1, count + 1)), None)
        await members.refresh()
        for engine in members.engines:
            engine.healthy = True
        fleet, found = Fleet(members, 6, 5.0, 5.0), []
        for k in range(300):
            async with fleet.engine("acme", f"adapter-{k}", frozenset[Engine]()) as engine:
                found.append(engine.url)
        await fleet.close()
        return found

    three, two = asyncio.run(homes(3)), asyncio.run(homes(2))
    assert all(80 < count < 120 for count in Counter(three).values())
    left = "http://127.0.0.1:3"
    assert all(now == then for now, then in zip(two, three, strict=True) if then != left)
    assert set(two) == set(three) - {left}


def test_a_caller_that_leaves_as_its_turn_comes_gets_no_place() -> None:
    async def scene() -> bool:
        members = Discovery(("http://127.0.0.1:9",), None)
        await members.refresh()
        (engine,) = members.engines
        engine.healthy = True
        fleet = Fleet(members, 1, 5.0, 5.0)

        async def ask() -> None:
            async with fleet.engine("acme", "base", frozenset[Engine]()):
                raise AssertionError("it has left")

        async with AsyncExitStack() as held:
            await held.enter_async_context(fleet.engine("other", "base", frozenset[Engine]()))
            asked = asyncio.create_task(ask())
            await asyncio.sleep(0)
        asked.cancel()  # its turn has come, and it has not run since
        await asyncio.wait((asked,))
        async with asyncio.timeout(1), fleet.engine("third", "base", frozenset[Engine]()):
            pass
        await fleet.close()
        return asked.cancelled()

    assert asyncio.run(scene())
