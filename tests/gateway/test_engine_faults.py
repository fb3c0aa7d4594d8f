"""What an engine answers instead of loading an adapter is read as data, whatever its sentences
say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

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


def test_each_fault_comes_whole_and_without_the_path(
    served: tuple[FakeEngine, str], tmp_path: Path
) -> None:
    fake, url = served
    fake.refuse_adapters = (
        f"R holds NaN; {tmp_path} has been cannot be used: or already been loaded"
    )
    with pytest.raises(AdapterInvalid) as refused:
        load(url, "v", tmp_path)
    assert refused.value.faults == (
        "R holds NaN; it has been cannot be used: or already been loaded",
    )


def test_an_engine_of_the_previous_release_has_vllm_s_type_for_a_name_that_is_taken(
    tmp_path: Path,
) -> None:
    async def taken(_: Request) -> JSONResponse:
        error = {
            "message": "it has already been loaded",
            "type": "InvalidUserInput",
            "param": None,
            "code": 400,
        }
        return JSONResponse({"error": error}, 400)

    server = Served(Starlette(routes=[Route("/v1/load_lora_adapter", taken, methods=["POST"])]))
    try:
        load(server.url, "v", tmp_path)
    finally:
        server.stop()


def test_a_version_that_is_loaded_already_is_no_failure(
    served: tuple[FakeEngine, str], tmp_path: Path
) -> None:
    fake, url = served
    fake.adapters["v"] = str(tmp_path)
    load(url, "v", tmp_path)
    assert fake.counts["load"] == 0
