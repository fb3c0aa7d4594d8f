"""Killed workers, gateways and connections: a short run of what `scripts/bench jobs` does at
length.
"""

from __future__ import annotations

import pytest

from tests.support.training.chaos import Chaos
from tests.support.training.jobs import QUICK, Place

pytestmark = pytest.mark.anyio


async def test_jobs_survive_what_kills_their_workers(place: Place) -> None:
    chaos = Chaos(place, seed=1, kinds=2, hyperparameters=QUICK | {"n_epochs": 4})
    await chaos.undisturbed()
    await chaos.ask(tenants=2, jobs=5)
    async with chaos.processes(workers=2):
        await chaos.run((0.5, 1.5), most=150, most_kills=3)
        await chaos.judge()
    assert await chaos.leftovers() == []
    assert chaos.tally.kills["worker"]
    assert chaos.tally.ended.total() == 5
