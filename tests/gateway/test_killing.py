"""kill -9 of each process, and of the database's connections, in the middle of streams:
benchmarks/chaos.py in small.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.killing.rounds import Scene, scene
from tests.support.postgres import BOTH, create_database

STREAMS = 30


@pytest.fixture(params=BOTH)
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    url = f"sqlite:///{tmp_path / 'reft.db'}"
    if request.param != "sqlite":
        url = create_database(request.getfixturevalue("postgres"), f"killed_{secrets.token_hex(6)}")
    with scene(tmp_path, url) as found:
        yield found


def test_no_answer_is_wrong_no_record_lost_or_doubled_and_nothing_left_at_work(
    running: Scene,
) -> None:
    undisturbed = asyncio.run(running.play(STREAMS, None, 0))
    assert undisturbed.ended == {"whole": STREAMS}
    assert undisturbed.faults == []
    for kill in (running.gateway.kill, running.engine.kill, running.cut_connections):
        killed = asyncio.run(running.play(STREAMS, kill, 0.5))
        assert killed.faults == []
        # nobody waits for the database but at the beginning and at the end
        if kill == running.cut_connections:
            assert killed.ended == {"whole": STREAMS}
        else:
            assert killed.ended["whole"] < STREAMS
