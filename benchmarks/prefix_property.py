"""Many random requests with the prefix cache on, each compared with its run without: the property
test, at length.

Adapters, position rules, prompts, salts, strengths and their order are drawn at random
(tests/support/engine/prefix_cases.py); the same judge as in the tests compares every logprob and
every count of cached tokens. A difference above 1e-3, or a block shared that must not be or not
shared that could be, ends the run with the smallest case that shows it.

  scripts/bench prefix_property --requests 50000
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks._report import save
from tests.support.engine.prefix_judge import TOLERANCE, judge_random, judging


def main() -> None:
    """Run until there have been enough requests, print what was seen, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console, started = Console(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, judging(Path(folder)) as judge:
        for tally in judge_random(judge, args.requests, widest=80, first_seed=args.seed):
            console.print(
                f"{tally.requests} requests of {tally.adapters} adapters, {tally.cached_tokens} "
                f"of {tally.prompt_tokens} prompt tokens from the cache, largest difference "
                f"{tally.largest_difference:.2g}"
            )
    seconds = round(time.perf_counter() - started)
    save(
        "prefix-property",
        {"arguments": vars(args), "tolerance": TOLERANCE, "seconds": seconds} | asdict(judge.tally),
    )


if __name__ == "__main__":
    main()
