"""Milliseconds for an orthonormal R and its gradient, by how it is computed: why training uses the
compact WY form.

All are functions of a trained tensor as large as R. `wy` and `householder` are the same function
(pyreft's), computed in two ways; `cayley` and `matrix_exp` are torch's other parametrisations,
which are other functions.

  scripts/bench rotation        about a minute on one core
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from benchmarks._report import save
from reft_serve.interventions.modules import Intervention

WAYS = ("wy", "householder", "cayley", "matrix_exp")
# Beyond this width the last two take seconds to minutes: they work on a (width, width) matrix.
_WIDEST_SQUARE = 768


def main() -> None:
    """Run the benchmark, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", default="192,768,4096")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [_row(int(width), args.rank, args.rounds) for width in args.widths.split(",")]
    table = Table("width", *WAYS, title=f"ms, forward and backward, rank {args.rank}")
    for row in rows:
        table.add_row(
            str(row["width"]), *(f"{row[way]:.2f}" if row[way] is not None else "-" for way in WAYS)
        )
    Console().print(table)
    save("rotation", {"arguments": vars(args), "rows": rows})


def _row(width: int, rank: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    ways = {
        way: _way(way, width, rank)
        for way in WAYS
        if width <= _WIDEST_SQUARE or way in ("wy", "householder")
    }
    pull = torch.randn(rank, width)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, (R, parameter) in ways.items():
            started = time.process_time()
            torch.autograd.grad((R() * pull).sum(), parameter)
            times[way].append(1e3 * (time.process_time() - started))
    return {"width": width} | {
        way: statistics.median(times[way][1:]) if way in times else None for way in WAYS
    }


def _way(way: str, width: int, rank: int) -> tuple[Callable[[], Tensor], Tensor]:
    if way == "wy":
        rotation: Any = Intervention("loreft", width, rank).rotation
        return rotation.rows, rotation.parametrizations.weight.original
    holder: Any = nn.Linear(rank, width, bias=False)
    orthogonal(holder, orthogonal_map=way)
    return lambda: holder.weight.T, holder.parametrizations.weight.original


if __name__ == "__main__":
    main()
