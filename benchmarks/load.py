"""Load as users make it, against `reft-serve up`: what arrives does not wait for what is under way.

Requests arrive at random (Poisson), of several tenants, the first with most of them; each picks one of its tenant's adapters
(Zipf) or, one time in ten, the base model; prompts are short or long, and half of them begin with their tenant's system
prompt. Times count from the moment at which a request was to be sent, so that a slow server is not spared what it delays.
Goodput is the rate of requests whose first token came within --first-token and whose further tokens came within
--each-token on average. Memory is the resident set of every process, read every ten seconds.

Where Debian's package `prometheus` is installed, one watches the run, and the panels of the Grafana dashboard are drawn from
its own expressions.

  scripts/bench load                               a minute at each of some rates
  scripts/bench load --rates 0.5 --minutes 32 --hurry 8000 --warm-up 2 --tag soak
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks._deployment import Deployment, Tenant, watching
from benchmarks._panels import draw, measure
from benchmarks._report import save

_VOCABULARY = (
    "once there was a little girl boy cat dog bird who went to the park with her friend and saw big red ball tree sun "
    "mother said play happy sad rain house day they wanted find new toy but it very fun share"
)
WORDS = _VOCABULARY.split()
# A cache of a size that a run fills soon: pages that were never touched are no resident memory.
FLAGS = f"--dtype float32 --max-num-seqs 64 --kv-cache-memory-bytes {256 << 20}"
SCRAPE_SECONDS = 5
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


def arrivals(rate: float, seconds: float, tenants: Sequence[Tenant], chance: random.Random) -> list[Arrival]:
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
                found.error = f"{answer.status_code}: {(await answer.aread())[:200].decode(errors='replace')}"
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


async def drive(deployment: Deployment, tenants: Sequence[Tenant], run: Run, chance: random.Random) -> None:
    """Let a run's requests arrive, and wait for the last answer."""
    planned = arrivals(run.rate, run.seconds, tenants, chance)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    timeout = httpx.Timeout(600, connect=30)
    async with httpx.AsyncClient(base_url=deployment.url, limits=limits, timeout=timeout, trust_env=False) as client:
        run.begun, begun = time.time(), time.perf_counter()
        watching_memory = asyncio.create_task(_watch_memory(deployment, run, begun))
        run.outcomes = list(await asyncio.gather(*(ask(client, arrival, begun) for arrival in planned)))
        watching_memory.cancel()


async def hurry(deployment: Deployment, tenants: Sequence[Tenant], count: int, chance: random.Random) -> None:
    """Send `count` short requests as fast as some connections take them, and count nothing: what fills with use (kernels for
    each number of tokens, caches of the database) is full then.
    """
    left = iter(range(count))

    async def one(client: httpx.AsyncClient) -> None:
        for _ in left:
            tenant = chance.choice(tenants)
            prompt = _words(chance, chance.randint(1, 200))
            await ask(client, Arrival(0, tenant, chance.choice(tenant.models), prompt, False, 2), time.perf_counter())

    async with httpx.AsyncClient(base_url=deployment.url, timeout=600, trust_env=False) as client:
        await asyncio.gather(*(one(client) for _ in range(CONNECTIONS)))


async def _watch_memory(deployment: Deployment, run: Run, begun: float) -> None:
    while True:
        run.memory.append((time.perf_counter() - begun, deployment.memory()))
        await asyncio.sleep(MEMORY_SECONDS)


def summary(outcomes: Sequence[Outcome], seconds: float, args: argparse.Namespace) -> dict[str, Any]:
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


def growth(memory: Sequence[tuple[float, dict[str, int]]], warm_up: float) -> dict[str, dict[str, float]]:
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
    found["late_ms_p99"] = round(1e3 * sorted(each.late for each in outcomes)[int(0.99 * (len(outcomes) - 1))], 2)
    found["errors"] = Counter(each.error for each in outcomes if each.error).most_common(10)
    # A slope over less would be noise.
    long_enough = run.seconds >= 60 * args.warm_up + SLOPE_SECONDS
    found["memory"] = growth(run.memory, 60 * args.warm_up) if long_enough else {}
    found["memory_mb"] = [
        [round(at), {name: round(size / 1e6, 1) for name, size in sizes.items()}] for at, sizes in run.memory
    ]
    return found


def main() -> None:
    """Run the benchmark, print its table, write JSON and plots."""
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what it started is ended
    name = "load" if args.tag is None else f"load-{args.tag}"
    chance, rates = random.Random(args.seed), [float(rate) for rate in args.rates.split(",")]
    runs = [Run(rate, args.minutes * 60) for rate in rates]
    panels: list[dict[str, Any]] | None = None
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        deployment = Deployment(folder, args.flags.split())
        try:
            tenants = [deployment.tenant(f"tenant-{k}", args.adapters, k) for k in range(args.tenants)]
            with watching(folder, deployment, SCRAPE_SECONDS) as prometheus:
                asyncio.run(hurry(deployment, tenants, args.hurry, chance))
                asyncio.run(drive(deployment, tenants, Run(rates[0], 20), chance))  # not counted
                for run in runs:
                    asyncio.run(drive(deployment, tenants, run, chance))
                    _print(run, args)
                if prometheus is not None:
                    time.sleep(2 * SCRAPE_SECONDS)
                    panels = measure(prometheus, runs[0].begun, time.time(), SCRAPE_SECONDS)
        finally:
            deployment.stop()
    result = {"arguments": vars(args), "load_average": os.getloadavg(), "runs": [result_of(run, args) for run in runs]}
    if panels is not None:
        result["panels"] = panels
        draw(panels, f"{name}-dashboard")
    save(name, result, _plot_soak if len(runs) == 1 else _plot_rates)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="1,2,4,8,16", help="requests per second, one run each")
    parser.add_argument("--minutes", type=float, default=1.0, help="of each run")
    parser.add_argument("--warm-up", type=float, default=10.0, help="minutes before memory's growth is looked at")
    parser.add_argument("--hurry", type=int, default=0, help="requests sent before all runs, as fast as they are taken")
    parser.add_argument("--tenants", type=int, default=3)
    parser.add_argument("--adapters", type=int, default=12, help="of each tenant")
    parser.add_argument("--first-token", type=float, default=0.5, help="seconds, for goodput")
    parser.add_argument("--each-token", type=float, default=0.1, help="seconds, for goodput")
    parser.add_argument("--flags", default=FLAGS, help="for `up`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", help="what else ran on the machine; kept with the result")
    parser.add_argument("--tag", help="suffix of the result's file name")
    return parser.parse_args()


def _print(run: Run, args: argparse.Namespace) -> None:
    found = result_of(run, args)
    table = Table(
        f"{run.rate:g} requests/s", "requests", "errors", "within", "first token p50, p95, p99 ms", "each p50, p95, p99"
    )
    for name, each in [("all", found["all"]), *found["tenants"].items(), *found["prompts"].items()]:
        times = (
            ", ".join(f"{value:.0f}" for value in each.get(f"{what}_token_ms", {}).values())
            for what in ("first", "each")
        )
        table.add_row(name, str(each["requests"]), str(each["errors"]), f"{each['within'] or 0:.3f}", *times)
    Console().print(table)
    for name, each in found["memory"].items():
        Console().print(
            f"{name}: {each['first_mb']} MB after the warm-up, {each['last_mb']} MB at the end, "
            f"{each['growth_per_hour']:+.2%} per hour"
        )
    for error, count in found["errors"]:
        Console().print(f"{count} x {error}", markup=False)


def _plot_rates(result: dict[str, Any], axes: Any) -> None:
    runs = result["runs"]
    rates = [run["rate"] for run in runs]
    axes.plot(rates, [run["all"]["goodput_per_s"] for run in runs], "o-", color="#00897b", label="goodput")
    axes.plot(rates, rates, ":", color="grey", label="offered")
    axes.set_xlabel("requests per second, offered")
    axes.set_ylabel("requests per second, in time")
    other = axes.twinx()
    for quantile, style in (("p50", "-"), ("p95", "--"), ("p99", ":")):
        times = [run["all"]["first_token_ms"][quantile] for run in runs]
        other.plot(rates, times, style, color="#ef6c00", label=f"first token, {quantile}")
    other.set_ylabel("ms")
    other.set_yscale("log")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    other.legend(loc="lower right", frameon=False, fontsize=8)


def _plot_soak(result: dict[str, Any], axes: Any) -> None:
    (run,) = result["runs"]
    for name in sorted({name for _, sizes in run["memory_mb"] for name in sizes}):
        points = [(at / 60, sizes[name]) for at, sizes in run["memory_mb"] if name in sizes]
        axes.plot(*zip(*points, strict=True), label=name)
    axes.axvline(result["arguments"]["warm_up"], color="grey", linestyle=":", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("minutes")
    axes.set_ylabel("resident MB")
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
