"""Whose turn it is at an engine, without HTTP."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

from reft_serve.gateway.engine import Engine
from reft_serve.gateway.fleet import Fleet
from reft_serve.gateway.membership import Membership


def test_a_tenant_that_is_behind_gets_what_it_lacks_and_no_more() -> None:
    """Answers of 100 tokens, six places, and a tenant that lacks three answers: the rest is shared out."""

    async def shares() -> Counter[str]:
        members = Membership(("http://127.0.0.1:9",), None)
        await members.look_up()
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
