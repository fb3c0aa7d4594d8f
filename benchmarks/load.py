"""Load as users make it, against `reft-serve up`: what arrives does not wait for what is under way.

Requests arrive at random (Poisson), of several tenants, the first with most of them; each picks one
of its tenant's adapters (Zipf) or, one time in ten, the base model; prompts are short or long, and
half of them begin with their tenant's system prompt. Times count from the moment at which a request
was to be sent, so that a slow server is not spared what it delays. Goodput is the rate of requests
whose first token came within --first-token and whose further tokens came within --each-token on
average. Memory is the resident set of every process, read every ten seconds.

Where Debian's package `prometheus` is installed, one watches the run, and the panels of the Grafana
dashboard are drawn from its own expressions.

  scripts/bench load                               a minute at each of some rates
  scripts/bench load --rates 0.5 --minutes 32 --hurry 8000 --warm-up 2 --tag soak
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._deployment import Deployment, watching
from benchmarks._panels import draw, measure
from benchmarks._report import save
from tests.support.deploy.open_loop import (
    Run,
    drive,
    hurry,
    result_of,
)

# A cache of a size that a run fills soon: pages that were never touched are no resident memory.
FLAGS = f"--dtype float32 --max-num-seqs 64 --kv-cache-memory-bytes {256 << 20}"
SCRAPE_SECONDS = 5


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
            tenants = [
                deployment.tenant(f"tenant-{k}", args.adapters, k) for k in range(args.tenants)
            ]
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
    result = {
        "arguments": vars(args),
        "load_average": os.getloadavg(),
        "runs": [result_of(run, args) for run in runs],
    }
    if panels is not None:
        result["panels"] = panels
        draw(panels, f"{name}-dashboard")
    save(name, result, _plot_soak if len(runs) == 1 else _plot_rates)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", default="1,2,4,8,16", help="requests per second, one run each")
    parser.add_argument("--minutes", type=float, default=1.0, help="of each run")
    parser.add_argument(
        "--warm-up", type=float, default=10.0, help="minutes before memory's growth is looked at"
    )
    parser.add_argument(
        "--hurry",
        type=int,
        default=0,
        help="requests sent before all runs, as fast as they are taken",
    )
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
    result = result_of(run, args)
    table = Table(
        f"{run.rate:g} requests/s",
        "requests",
        "errors",
        "within",
        "first token p50, p95, p99 ms",
        "each p50, p95, p99",
    )
    for name, each in [
        ("all", result["all"]),
        *result["tenants"].items(),
        *result["prompts"].items(),
    ]:
        times = (
            ", ".join(f"{value:.0f}" for value in each.get(f"{what}_token_ms", {}).values())
            for what in ("first", "each")
        )
        table.add_row(
            name, str(each["requests"]), str(each["errors"]), f"{each['within'] or 0:.3f}", *times
        )
    Console().print(table)
    for name, each in result["memory"].items():
        Console().print(
            f"{name}: {each['first_mb']} MB after the warm-up, {each['last_mb']} MB at the end, "
            f"{each['growth_per_hour']:+.2%} per hour"
        )
    for error, count in result["errors"]:
        Console().print(f"{count} x {error}", markup=False)


def _plot_rates(result: dict[str, Any], axes: Any) -> None:
    runs = result["runs"]
    rates = [run["rate"] for run in runs]
    axes.plot(
        rates, [run["all"]["goodput_per_s"] for run in runs], "o-", color="#00897b", label="goodput"
    )
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
