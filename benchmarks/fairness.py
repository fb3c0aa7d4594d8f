"""What one tenant's flood does to another's time to first token.

Two tenants share a gateway. The one that is measured sends streams at random moments (Poisson), always alike. The other one
has a limit of requests per minute; it is away, sends what its limit allows, or sends fifty times that. The three take turns;
times count from the moment at which a request was to be sent, so that a slow server is not spared what it delays. The fake
engine answers after 50 ms and then every 20 ms, as a model of some size does; `--engine real` is the shipped model under
`reft-serve up`. The flooding tenant's client is a process of its own: what it costs is not in the other one's times.

  scripts/bench fairness
  scripts/bench fairness --engine real
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._deployment import Deployment
from benchmarks._report import save
from tests.support.gateway.flood import ARMS, another_process, fake, tenants, turn


@contextmanager
def real() -> Iterator[tuple[str, str]]:
    """The same for `reft-serve up`."""
    with tempfile.TemporaryDirectory() as folder:
        deployment = Deployment(Path(folder), [])
        try:
            yield deployment.url, deployment.key
        finally:
            deployment.stop()


def p99(seconds: list[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(seconds, n=100)[98]


def main() -> None:
    """Run the benchmark, print its table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("fake", "real"), default="fake")
    parser.add_argument(
        "--rate", type=float, default=20.0, help="the steady tenant's streams per second"
    )
    parser.add_argument("--limit", type=int, default=120, help="the other's requests per minute")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="per arm and round")
    args = parser.parse_args()
    firsts: dict[str, list[float]] = {name: [] for name in ARMS}
    others: dict[str, Counter[int]] = {name: Counter() for name in ARMS}
    with (fake if args.engine == "fake" else real)() as (url, admin), another_process() as flooding:
        place = tenants(url, admin, args.limit)
        turn(place, flooding, args.rate, 1.0, 4.0)
        for _ in range(args.rounds):
            for name, times in ARMS.items():
                waits, answered = turn(
                    place, flooding, args.rate, times * args.limit / 60, args.seconds
                )
                firsts[name] += waits
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
    table = Table(
        "the other tenant is", "its answers", "429", "streams", "first event p50, ms", "p99, ms"
    )
    for name, each in result["first_event_ms"].items():
        flood = result["flooding"][name]
        counts = (
            f"{number:,}" for number in (flood["answered"], flood["refused"], each["streams"])
        )
        table.add_row(name, *counts, f"{each['p50']:.1f}", f"{each['p99']:.1f}")
    Console().print(table)
    for what, moved in result["p99_moves"].items():
        Console().print(f"p99 {what}: {moved:+.1%}")


if __name__ == "__main__":
    main()
