"""Ten thousand adapters through 64 slots: memory, lost requests, and how long a load holds up everyone else.

All adapters are loaded once by name, so that the server knows them; then loads, in-place reloads, unloads, pins, lists and
loads of directories that are not there come from several callers at once, through vLLM's own handlers of
`/v1/load_lora_adapter` and `/v1/unload_lora_adapter` and its engine's `pin_lora` and `list_loras`, while clients ask any
known adapter, until the worker has loaded --loads times. Most requests meet an adapter without a slot.

An answer that differs from the adapter's first one, that ends in an error, or that never comes is counted. Memory is the
resident set of each process. The engine runs no step while it handles a load, so the time of that message is the stall.

  scripts/bench churn
  scripts/bench churn --adapters 500 --loads 5000       in a minute
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._report import save
from tests.support.engine.churn import (
    environment,
    run,
)


def main() -> None:
    """Run the benchmark, print its table, write JSON and a plot."""
    args = arguments()
    os.environ |= environment(args)
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, Path(folder))
    _print(Console(), result)
    save("churn" if args.tag is None else f"churn-{args.tag}", result, _plot)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """What the command line says, or `argv`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--adapters", type=int, default=10_000, help="adapters known to the server by name"
    )
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument(
        "--loads", type=int, default=50_000, help="loads on the worker until the run ends"
    )
    parser.add_argument(
        "--callers", type=int, default=4, help="how many load, unload, pin and list at once"
    )
    parser.add_argument("--clients", type=int, default=16, help="requests under way at any time")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tag", help="suffix of the result's file name")
    return parser.parse_args(argv)


def _print(console: Console, result: dict[str, Any]) -> None:
    args, before, after = result["arguments"], result["memory_known"], result["memory_end"]
    console.print(
        f"{result['loads']:,} loads of {args['adapters']:,} adapters through {args['slots']} slots, "
        f"{result['requests']:,} requests meanwhile; calls: "
        + ", ".join(f"{kind} {count:,}" for kind, count in sorted(result["operations"].items()))
    )
    table = Table(
        title=f"resident memory in MB, from load {before['loads']:,.0f}, all known, to the end"
    )
    for column in (
        "process",
        "before",
        "after",
        "grown",
        "bytes per load",
        "entries before",
        "after",
    ):
        table.add_column(column, justify="left" if column == "process" else "right")
    for name, grown in result["grown_bytes"].items():
        each = grown / (after["loads"] - before["loads"])
        megabytes = (before[name] / 1e6, after[name] / 1e6, grown / 1e6)
        table.add_row(
            name.replace("_", " "), *(f"{value:,.1f}" for value in megabytes), f"{each:,.0f}",
            *(f"{point[f'{name}_entries']:,}" for point in (before, after)),
        )  # fmt: skip
    console.print(table)
    table = Table(title="how long the engine's loop is held up, in ms")
    for column in ("by", "count", "p50", "p99", "max"):
        table.add_column(column, justify="left" if column == "by" else "right")
    names = {"call": "a load call", "request": "a request that comes in"}
    rows = {names[kind]: stall for kind, stall in result["stall_ms"].items()}
    for name, stall in (
        rows | {"of these and in steps: filling a slot": result["slot_ms"]}
    ).items():
        table.add_row(
            name, f"{stall['count']:,}", *(f"{stall[key]:.2f}" for key in ("p50", "p99", "max"))
        )
    console.print(table)
    console.print(
        f"requests lost: {result['lost']}; answers that changed: {result['wrong']}; calls gone wrong: {result['unexpected']}"
    )
    for line in result["lost_first"] + result["unexpected_first"]:
        console.print(f"  {line}")


def _plot(result: dict[str, Any], axes: Any) -> None:
    points, known = result["memory"], result["memory_known"]["loads"]
    for name in ("worker", "core", "front_end"):
        grown = [(point[name] - points[0][name]) / 1e6 for point in points]
        axes.plot([point["loads"] for point in points], grown, label=name.replace("_", " "))
    axes.axvline(known, color="0.6", linewidth=0.8)
    axes.annotate(
        "all known", (known, 0), xytext=(4, 4), textcoords="offset points", fontsize=8, color="0.4"
    )
    axes.set_xlabel(
        f"loads ({result['arguments']['adapters']:,} adapters, {result['arguments']['slots']} slots)"
    )
    axes.set_ylabel("resident memory since the start, MB")
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
