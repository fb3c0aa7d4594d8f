"""Tenants against one another, at length: random acts of three tenants with keys, adapters, aliases, shares, files, jobs and
permissions, each answer compared with what the actor's own world allows. An answer that holds anything of another tenant's,
a count, a version's weights or a cache salt among it, ends the run with the shortest sequence that shows it.

  scripts/bench isolation --steps 5000
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from rich.console import Console

from benchmarks._report import save
from tests.support.gateway.harness import running
from tests.support.isolation.jobs import Everything

_STEPS_PER_RUN = 50


def main() -> None:
    """Run until there have been enough steps, print what was seen, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5_000)
    args = parser.parse_args()
    console, begun, runs = Console(), time.perf_counter(), 0
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder), webhooks_to_private_addresses=True) as (gateway, (engine,)),
    ):
        Everything.gateway, Everything.engine = gateway, engine
        while (left := args.steps - Everything.tally["steps"]) > 0:
            batch = settings(
                max_examples=min(20, math.ceil(left / _STEPS_PER_RUN)), stateful_step_count=_STEPS_PER_RUN, deadline=None,
                database=None, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            run_state_machine_as_test(Everything, settings=batch)
            runs += batch.max_examples
            console.print(f"{Everything.tally['steps']} steps: {dict(Everything.tally)}")
    save(
        "isolation",
        {
            "arguments": vars(args),
            "hypothesis": importlib.metadata.version("hypothesis"),
            "seconds": round(time.perf_counter() - begun),
            "runs": runs,
            "breaches": 0,
            "counts": dict(Everything.tally),
        },
    )


if __name__ == "__main__":
    main()
