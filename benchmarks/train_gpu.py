"""Training on a GPU: an 8B-shaped frozen base in bfloat16 with gradient checkpointing, and what share of the card it uses.

The base has Llama 3's shape and random weights, made on the card; LoReFT of rank 8 at all layers, f7+l7. Printed and kept:
tokens per second, peak memory, and the share of the card's own ceiling, which is a large bfloat16 product timed first. A
token costs 2 operations per weight forward, 2 more where the backward pass computes it again, and 2 backward (no gradient
of the frozen weights); the share counts the forward and backward ones alone, so recomputing is not a merit.

  scripts/bench train_gpu                          an NVIDIA GPU with about 40 GB free
  scripts/bench train_gpu --pyreft ENV/bin/python  pyreft 0.1.0 as well, from that environment, without checkpointing (its
                                                   hooks do not survive it) and with --pyreft-batch examples at once
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from rich.console import Console

from benchmarks._report import save
from benchmarks._train_sides import ask, side
from tests.support.training.gpu_step import SHAPES, cuda, measure
from tests.support.training.steps import Rows


def main() -> None:
    """Run the benchmark, print its figures, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--length", type=int, default=512, help="tokens of an example, a quarter of them its answer"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--pyreft", metavar="PYTHON", help="interpreter of an environment with pyreft 0.1.0"
    )
    parser.add_argument("--pyreft-batch", type=int, default=2)
    args = parser.parse_args()
    result = measure(args, cuda(parser), _pyreft if args.pyreft else None)
    Console().print_json(data=result)
    save("train-gpu", result)


def _pyreft(
    args: argparse.Namespace, base: str, examples: Rows, device: torch.device
) -> dict[str, float]:
    setup = {
        "base": base, "dtype": "bfloat16", "threads": 2, "rank": 8, "positions": "f7+l7", "batch": args.pyreft_batch,
        "accumulate": 1, "device": device.type,
    }  # fmt: skip
    command = [args.pyreft, str(Path(__file__).parent / "_train_pyreft.py")]
    with side(command, setup) as them:
        answer = ask(them, {"examples": examples[: args.pyreft_batch * (args.steps + 1)]})
    rate = args.pyreft_batch * args.length / statistics.median(answer["seconds"][1:])
    return {
        "tokens_per_second": rate,
        "peak_gib": answer["peak_mib"] / 1024,
        "batch": args.pyreft_batch,
    }


if __name__ == "__main__":
    main()
