"""One tenant beside another that floods the gateway."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.gateway.harness import first_key
from tests.support.gateway.process import free_port, listening
from tests.support.gateway.streaming_tenant import tenant

FIRST_SECONDS, TOKEN_SECONDS = 0.05, 0.02
ARMS: Mapping[str, float] = {"away": 0.0, "at its limit": 1.0, "at 50x its limit": 50.0}


@dataclass(frozen=True, slots=True)
class Place:
    """A gateway and the keys of the two tenants."""

    url: str
    steady: str
    flooding: str


def turn(
    place: Place, others: ProcessPoolExecutor, rate: float, flood: float, seconds: float
) -> tuple[list[float], Counter[int]]:
    """(the steady tenant's seconds to first events, the other's answers by status)."""
    until = time.perf_counter() + seconds  # the same clock in every process
    flooding = others.submit(tenant, place.url, place.flooding, flood, until)
    given, firsts = tenant(place.url, place.steady, rate, until)
    assert set(given) == {200}, f"the steady tenant was not always answered: {given}"
    return firsts, flooding.result()[0]


def another_process() -> ProcessPoolExecutor:
    """Where the flooding tenant lives."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


@contextmanager
def fake() -> Iterator[tuple[str, str]]:
    """A gateway over the fake engine: its URL and an admin's key."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        port, engine, database = free_port(), free_port(), f"sqlite:///{Path(folder) / 'reft.db'}"
        command = [
            sys.executable,
            "-m",
            "tests.support.gateway.engine_process",
            str(engine),
            str(TOKEN_SECONDS),
        ]
        stack.enter_context(listening([*command, str(FIRST_SECONDS)], engine))
        key = asyncio.run(first_key(database))
        settings = {
            "REFT_DATABASE": database,
            "REFT_STORE": folder,
            "REFT_ENGINES": f"http://127.0.0.1:{engine}",
        }
        gateway = [sys.executable, "-m", "reft_serve.cli.gateway", "--port", str(port)]
        stack.enter_context(listening(gateway, port, **settings))
        yield f"http://127.0.0.1:{port}", key


def tenants(url: str, admin: str, limit: int) -> Place:
    """Two tenants, the second with a limit of requests per minute."""
    with httpx.Client(
        base_url=url, headers={"authorization": f"Bearer {admin}"}, timeout=60, trust_env=False
    ) as http:
        keys = []
        for name, limits in (("steady", {}), ("flooding", {"requests_per_minute": limit})):
            http.post("/v1/admin/tenants", json={"name": name, "limits": limits}).raise_for_status()
            made = http.post(
                f"/v1/admin/tenants/{name}/keys", json={"role": "inference"}
            ).raise_for_status()
            keys.append(made.json()["secret"])
    return Place(url, *keys)
