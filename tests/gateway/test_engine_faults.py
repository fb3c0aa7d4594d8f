"""What an engine answers instead of loading an adapter is read as data, whatever its sentences say."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from reft_serve.errors import AdapterInvalid
from reft_serve.gateway.engines.engine import Engine
from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Served


@pytest.fixture
def served() -> Iterator[tuple[FakeEngine, str]]:
    fake = FakeEngine()
    server = Served(fake.app)
    yield fake, server.url
    server.stop()


def load(url: str, name: str, path: Path) -> None:
    async def once() -> None:
        engine = Engine(0, url, None)
        try:
            await engine.load(name, path)
        finally:
            await engine.close()

    asyncio.run(once())


def test_each_fault_comes_whole_and_without_the_path(served: tuple[FakeEngine, str], tmp_path: Path) -> None:
    fake, url = served
    fake.refuse_adapters = f"R holds NaN; {tmp_path} has been cannot be used: or already been loaded"
    with pytest.raises(AdapterInvalid) as refused:
        load(url, "v", tmp_path)
    assert refused.value.faults == ("R holds NaN; it has been cannot be used: or already been loaded",)


def test_a_version_that_is_loaded_already_is_no_failure(served: tuple[FakeEngine, str], tmp_path: Path) -> None:
    fake, url = served
    fake.adapters["v"] = str(tmp_path)
    load(url, "v", tmp_path)
    assert fake.counts["load"] == 0
