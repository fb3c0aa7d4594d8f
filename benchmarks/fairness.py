"""What one tenant's flood does to another's time to first token.

Two tenants share a gateway. The one that is measured sends streams at random moments (Poisson), always alike. The other one
has a limit of requests per minute; it is away, sends what its limit allows, or sends fifty times that. The three take turns;
times count from the moment at which a request was to be sent, so that a slow server is not spared what it delays. Gateway,
engine and the tenants are processes of their own. The fake engine answers after 50 ms and then every 20 ms, as a model of
some size does; `--engine real` is the shipped model under `reft-serve up`.

  scripts/bench fairness
  scripts/bench fairness --engine real
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
from rich.console import Console
from rich.table import Table

from benchmarks._deployment import Deployment
from benchmarks._report import save
from benchmarks.gateway import free_port, process
from tests.gateway.harness import first_key

FIRST_SECONDS, TOKEN_SECONDS, TOKENS = 0.05, 0.02, 32
ARMS: Mapping[str, float] = {"away": 0.0, "at its limit": 1.0, "at 50x its limit": 50.0}


@dataclass(frozen=True, slots=True)
class Place:
    """A gateway and the keys of the two tenants."""

    url: str
    steady: str
    flooding: str


async def arrivals(rate: float, until: float) -> Any:
    """The moments of a Poisson process, each given when it has come."""
    due = time.perf_counter()
    while rate:
        due += random.expovariate(rate)
        if due >= until:
            return
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield due


async def stream(client: aiohttp.ClientSession, url: str, key: str, due: float) -> tuple[int, float]:
    """(status, seconds from `due` to the first event)."""
    body = {"model": "base", "prompt": "Once upon a time", "max_tokens": TOKENS, "stream": True, "ignore_eos": True}
    headers = {"authorization": f"Bearer {key}"}
    async with client.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
        await answer.content.readany()
        first = time.perf_counter() - due
        await answer.read()
        return answer.status, first


async def tenant(url: str, key: str, rate: float, until: float) -> tuple[Counter[int], list[float]]:
    """One tenant's life until then: its answers by status, and the seconds to the first event of those that were given."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        sent = []
        async for due in arrivals(rate, until):
            sent.append(asyncio.create_task(stream(client, url, key, due)))
        answers = await asyncio.gather(*sent)
    return Counter(status for status, _ in answers), [first for status, first in answers if status == 200]


def turn(place: Place, rate: float, flood: float, seconds: float) -> tuple[list[float], Counter[int]]:
    """(the steady tenant's seconds to first events, the other's answers by status)."""

    async def both() -> tuple[tuple[Counter[int], list[float]], tuple[Counter[int], list[float]]]:
        until = time.perf_counter() + seconds
        steady = tenant(place.url, place.steady, rate, until)
        return await asyncio.gather(steady, tenant(place.url, place.flooding, flood, until))

    (given, firsts), (others, _) = asyncio.run(both())
    assert set(given) == {200}, f"the steady tenant was not always answered: {given}"
    return firsts, others


@contextmanager
def fake() -> Iterator[tuple[str, str]]:
    """A gateway over the fake engine: its URL and an admin's key."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        port, engine, database = free_port(), free_port(), f"sqlite:///{Path(folder) / 'reft.db'}"
        command = [sys.executable, "-m", "tests.gateway.engine_process", str(engine), str(TOKEN_SECONDS)]
        stack.enter_context(process([*command, str(FIRST_SECONDS)], engine))
        key = asyncio.run(first_key(database))
        settings = {"REFT_DATABASE": database, "REFT_STORE": folder, "REFT_ENGINES": f"http://127.0.0.1:{engine}"}
        gateway = [sys.executable, "-m", "reft_serve.cli_gateway", "--port", str(port)]
        stack.enter_context(process(gateway, port, **settings))
        yield f"http://127.0.0.1:{port}", key


@contextmanager
def real() -> Iterator[tuple[str, str]]:
    """The same for `reft-serve up`."""
    with tempfile.TemporaryDirectory() as folder:
        deployment = Deployment(Path(folder), [])
        try:
            yield deployment.url, deployment.key
        finally:
            deployment.stop()


def tenants(url: str, admin: str, limit: int) -> Place:
    """Two tenants, the second with a limit of requests per minute."""
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {admin}"}, timeout=60, trust_env=False) as http:
        keys = []
        for name, limits in (("steady", {}), ("flooding", {"requests_per_minute": limit})):
            http.post("/v1/admin/tenants", json={"name": name, "limits": limits}).raise_for_status()
            made = http.post(f"/v1/admin/tenants/{name}/keys", json={"role": "inference"}).raise_for_status()
            keys.append(made.json()["secret"])
    return Place(url, *keys)


def p99(seconds: list[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(seconds, n=100)[98]


def main() -> None:
    """Run the benchmark, print its table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("fake", "real"), default="fake")
    parser.add_argument("--rate", type=float, default=20.0, help="the steady tenant's streams per second")
    parser.add_argument("--limit", type=int, default=120, help="the other's requests per minute")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="per arm and round")
    args = parser.parse_args()
    firsts: dict[str, list[float]] = {name: [] for name in ARMS}
    others: dict[str, Counter[int]] = {name: Counter() for name in ARMS}
    with (fake if args.engine == "fake" else real)() as (url, admin):
        place = tenants(url, admin, args.limit)
        turn(place, args.rate, 0.0, 3.0)
        for _ in range(args.rounds):
            for name, times in ARMS.items():
                found, answered = turn(place, args.rate, times * args.limit / 60, args.seconds)
                firsts[name] += found
                others[name] += answered
    result = {
        "arguments": vars(args),
        "first_event_ms": {
            name: {"p50": 1e3 * statistics.median(each), "p99": 1e3 * p99(each), "streams": len(each)}
            for name, each in firsts.items()
        },
        "flooding": {name: {"answered": each[200], "refused": each[429]} for name, each in others.items()},
        "p99_moves": {
            f"{name} against {than}": p99(firsts[name]) / p99(firsts[than]) - 1
            for name, than in (("at 50x its limit", "away"), ("at 50x its limit", "at its limit"))
        },
    }  # fmt: skip
    _print(result)
    save("fairness" if args.engine == "fake" else "fairness-real", result)


def _print(result: dict[str, Any]) -> None:
    table = Table("the other tenant is", "its answers", "429", "streams", "first event p50, ms", "p99, ms")
    for name, each in result["first_event_ms"].items():
        flood = result["flooding"][name]
        counts = (f"{number:,}" for number in (flood["answered"], flood["refused"], each["streams"]))
        table.add_row(name, *counts, f"{each['p50']:.1f}", f"{each['p99']:.1f}")
    Console().print(table)
    for what, moved in result["p99_moves"].items():
        Console().print(f"p99 {what}: {moved:+.1%}")


if __name__ == "__main__":
    main()
