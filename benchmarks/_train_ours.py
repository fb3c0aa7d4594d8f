"""Our side of `benchmarks.train`: reads jobs, trains, answers with times."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from reft_serve.interventions.positions import PositionRule
from reft_serve.training.model.adapter import build
from reft_serve.training.plan import AdapterPlan, Plan
from tests.support.training.steps import Rows, timed_steps

__all__ = ["Rows", "timed_steps"]


def main() -> None:
    """Answer until there are no more jobs."""
    setup = json.loads(sys.stdin.readline())
    torch.set_num_threads(setup["threads"])
    plan = Plan(
        AdapterPlan("loreft", setup["rank"], setup["layers"], PositionRule(setup["positions"])),
        epochs=setup["epochs"], batch=setup["batch"], accumulate=setup["accumulate"], dtype=setup["dtype"], shuffle=False,
        compile=setup.get("compile", False),
    )  # fmt: skip
    model = build(Path(setup["base"]), plan)
    packed = model.can_pack(512)
    print("@@ ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        Path("/proc/self/clear_refs").write_text("5")
        if job.get("profile"):
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU]
            ) as profile:
                timed_steps(model, plan, job["examples"], packed=packed)
            spent = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)[:12]
            answer: dict[str, Any] = {
                "profile": [[e.key, e.self_cpu_time_total / 1e3, e.count] for e in spent]
            }
        else:
            ends = timed_steps(model, plan, job["examples"], packed=packed)
            wall, cpu = ([b[k] - a[k] for a, b in itertools.pairwise(ends)] for k in (0, 1))
            answer = {"seconds": wall, "cpu_seconds": cpu}
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        answer["peak_mib"] = int(status["VmHWM"].split()[0]) / 1024
        print("@@", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
