"""Requests that arrive at random and do not wait for each other, and what became of them."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx


class Deployment(Protocol):
    """What requests go to: its URL, and the resident bytes of each of its processes."""

    url: str

    def memory(self) -> dict[str, int]: ...


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant of a deployment: its name, its key, and the names of its adapters."""

    name: str
    key: str
    models: tuple[str, ...]


_VOCABULARY = (
    "once there was a little girl boy cat dog bird who went to the park with her friend and saw big red ball tree sun "
    "mother said play happy sad rain house day they wanted find new toy but it very fun share"
)


WORDS = _VOCABULARY.split()
MEMORY_SECONDS, SLOPE_SECONDS = 10.0, 300.0
CONNECTIONS = 16


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come, at `at` seconds after the begin of its run."""

    at: float
    tenant: Tenant
    model: str
    prompt: str
    long: bool
    tokens: int


@dataclass(slots=True)
class Outcome:
    """What became of it. Seconds, from the moment it was to be sent; `error` is empty where all went well."""

    arrival: Arrival
    late: float = 0.0
    first: float = 0.0
    total: float = 0.0
    tokens: int = 0
    error: str = ""

    @property
    def each(self) -> float:
        """Seconds per token after the first."""
        return (self.total - self.first) / (self.tokens - 1) if self.tokens > 1 else 0.0


@dataclass(slots=True)
class Run:
    """One rate, for its time."""

    rate: float
    seconds: float
    begun: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    memory: list[tuple[float, dict[str, int]]] = field(default_factory=list)


def arrivals(
    rate: float, seconds: float, tenants: Sequence[Tenant], chance: random.Random
) -> list[Arrival]:
    """The requests of a run: the same for the same seed."""
    weights = [1 / (k + 1) for k in range(len(tenants))]
    system = {tenant.name: _words(chance, 150) for tenant in tenants}
    made, at = [], chance.expovariate(rate)
    while at < seconds:
        tenant = chance.choices(tenants, weights)[0]
        zipf = [1 / (k + 1) ** 1.1 for k in range(len(tenant.models))]
        model = "base" if chance.random() < 0.1 else chance.choices(tenant.models, zipf)[0]
        long = chance.random() < 0.25
        begin = system[tenant.name] + " " if chance.random() < 0.5 else ""
        prompt = begin + _words(chance, chance.randint(120, 200) if long else chance.randint(5, 30))
        made.append(Arrival(at, tenant, model, prompt, long, chance.randint(8, 48)))
        at += chance.expovariate(rate)
    return made


def _words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(count))


async def ask(client: httpx.AsyncClient, arrival: Arrival, begun: float) -> Outcome:
    """Send a request when its time has come, and read its answer to the end."""
    await asyncio.sleep(max(0.0, begun + arrival.at - time.perf_counter()))
    due, found = begun + arrival.at, Outcome(arrival)
    found.late = time.perf_counter() - due
    body = {
        "model": arrival.model, "prompt": arrival.prompt, "max_tokens": arrival.tokens, "stream": True,
        "ignore_eos": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    headers = {"authorization": f"Bearer {arrival.tenant.key}"}
    ended = False
    try:
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            if answer.status_code != 200:
                found.error = (
                    f"{answer.status_code}: {(await answer.aread())[:200].decode(errors='replace')}"
                )
                return found
            async for line in answer.aiter_lines():
                ended = ended or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    found.error = str(event["error"])[:200]
                elif event["choices"]:
                    found.first = found.first or time.perf_counter() - due
                    found.total = time.perf_counter() - due
                elif event.get("usage"):
                    found.tokens = event["usage"]["completion_tokens"]
    except httpx.HTTPError as exc:
        found.error = f"{type(exc).__name__}: {exc}"
    if not found.error and not (ended and found.tokens == arrival.tokens):
        found.error = f"{found.tokens} of {arrival.tokens} tokens came"
    return found


async def drive(
    deployment: Deployment, tenants: Sequence[Tenant], run: Run, chance: random.Random
) -> None:
    """Let a run's requests arrive, and wait for the last answer."""
    planned = arrivals(run.rate, run.seconds, tenants, chance)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    timeout = httpx.Timeout(600, connect=30)
    async with httpx.AsyncClient(
        base_url=deployment.url, limits=limits, timeout=timeout, trust_env=False
    ) as client:
        run.begun, begun = time.time(), time.perf_counter()
        watching_memory = asyncio.create_task(_watch_memory(deployment, run, begun))
        run.outcomes = list(
            await asyncio.gather(*(ask(client, arrival, begun) for arrival in planned))
        )
        watching_memory.cancel()


async def hurry(
    deployment: Deployment, tenants: Sequence[Tenant], count: int, chance: random.Random
) -> None:
    """Send `count` short requests as fast as some connections take them, and count nothing: what fills with use (kernels for
    each number of tokens, caches of the database) is full then.
    """
    left = iter(range(count))

    async def one(client: httpx.AsyncClient) -> None:
        for _ in left:
            tenant = chance.choice(tenants)
            prompt = _words(chance, chance.randint(1, 200))
            await ask(
                client,
                Arrival(0, tenant, chance.choice(tenant.models), prompt, False, 2),
                time.perf_counter(),
            )

    async with httpx.AsyncClient(base_url=deployment.url, timeout=600, trust_env=False) as client:
        await asyncio.gather(*(one(client) for _ in range(CONNECTIONS)))


async def _watch_memory(deployment: Deployment, run: Run, begun: float) -> None:
    while True:
        run.memory.append((time.perf_counter() - begun, deployment.memory()))
        await asyncio.sleep(MEMORY_SECONDS)


def summary(
    outcomes: Sequence[Outcome], seconds: float, args: argparse.Namespace
) -> dict[str, Any]:
    """The figures of some requests."""
    good = [each for each in outcomes if not each.error]
    met = [each for each in good if each.first <= args.first_token and each.each <= args.each_token]
    found: dict[str, Any] = {
        "requests": len(outcomes), "errors": len(outcomes) - len(good), "goodput_per_s": len(met) / seconds,
        "within": len(met) / len(outcomes) if outcomes else None,
        "tokens_per_s": sum(each.tokens for each in good) / seconds,
    }  # fmt: skip
    for name in ("first", "each"):
        values = sorted(1e3 * getattr(each, name) for each in good)
        if len(values) > 1:
            cuts = statistics.quantiles(values, n=100, method="inclusive")
            found[f"{name}_token_ms"] = {f"p{p}": round(cuts[p - 1], 2) for p in (50, 95, 99)}
    return found


def growth(
    memory: Sequence[tuple[float, dict[str, int]]], warm_up: float
) -> dict[str, dict[str, float]]:
    """Of each process: its resident MB after the warm-up and at the end, and its growth per hour, the slope of the least
    squares after the warm-up, as a share of its size.
    """
    later = [(at, sizes) for at, sizes in memory if at >= warm_up]
    found = {}
    for name in sorted({name for _, sizes in later for name in sizes}):
        points = [(at, sizes[name]) for at, sizes in later if name in sizes]
        if len(points) < 3:
            continue
        slope, _ = statistics.linear_regression(*zip(*points, strict=True))
        first, last = points[0][1], points[-1][1]
        found[name] = {
            "first_mb": round(first / 1e6, 1), "last_mb": round(last / 1e6, 1),
            "growth_per_hour": round(3600 * slope / first, 5),
        }  # fmt: skip
    return found


def result_of(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """A run's figures: of all requests, by tenant, by length of the prompt."""
    outcomes = run.outcomes
    groups = {
        "tenants": {each.arrival.tenant.name for each in outcomes},
        "prompts": {"long" if each.arrival.long else "short" for each in outcomes},
    }
    found = {"rate": run.rate, "seconds": run.seconds, "all": summary(outcomes, run.seconds, args)}
    for group, names in groups.items():
        found[group] = {
            name: summary(
                [each for each in outcomes if name in (each.arrival.tenant.name, "long" if each.arrival.long else "short")],
                run.seconds, args,
            )
            for name in sorted(names)
        }  # fmt: skip
    found["late_ms_p99"] = round(
        1e3 * sorted(each.late for each in outcomes)[int(0.99 * (len(outcomes) - 1))], 2
    )
    found["errors"] = Counter(each.error for each in outcomes if each.error).most_common(10)
    # A slope over less would be noise.
    long_enough = run.seconds >= 60 * args.warm_up + SLOPE_SECONDS
    found["memory"] = growth(run.memory, 60 * args.warm_up) if long_enough else {}
    found["memory_mb"] = [
        [round(at), {name: round(size / 1e6, 1) for name, size in sizes.items()}]
        for at, sizes in run.memory
    ]
    return found
