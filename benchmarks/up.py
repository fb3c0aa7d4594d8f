"""How long `reft-serve up` takes from nothing to the first answer of an adapter that was uploaded over the API.

Each start has a new data directory and new compile caches, as the first start on a machine has. The clock runs from the
command to the last token of the answer: every process's imports, the first key, the engine with the shipped model, the
upload of one of the shipped adapters, one completion. The second start of each round keeps the caches, as every later one.

  scripts/bench up
  scripts/bench up --flags="--enforce-eager" --tag eager
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks._deployment import DEMO, Deployment
from benchmarks._report import save

ADAPTER = DEMO / "adapters" / "birds"
PROMPT = "Once upon a time there was a little"
STEPS = (
    "first key",
    "live",
    "ready",
    "adapter uploaded",
    "first answer",
    "16 streams of 64 tokens",
)


def start(folder: Path, caches: Path, flags: list[str], limit: float) -> dict[str, float]:
    """Seconds from the command to each of STEPS, but for the last, which is a duration."""
    settings = {
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }
    running = Deployment(folder, flags, limit, **settings)
    try:
        seconds = dict(running.seconds)
        headers = {"authorization": f"Bearer {running.key}"}
        with httpx.Client(
            base_url=running.url, headers=headers, timeout=limit, trust_env=False
        ) as client:
            files = [
                ("files", (file.name, file.read_bytes())) for file in sorted(ADAPTER.iterdir())
            ]
            client.post("/v1/adapters", data={"name": "birds"}, files=files).raise_for_status()
            seconds["adapter uploaded"] = running.passed()
            body = {"model": "birds", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
            answer = client.post("/v1/completions", json=body).raise_for_status().json()
            seconds["first answer"] = running.passed()
            assert answer["model"] == "birds"
            assert answer["choices"][0]["text"].strip()
            seconds["16 streams of 64 tokens"] = decoding(client)
        return seconds
    finally:
        running.stop()


def decoding(client: httpx.Client) -> float:
    """Seconds for a batch, the second time it is asked: what the start's choices cost afterwards."""
    body = {
        "model": "birds", "prompt": PROMPT, "max_tokens": 64, "n": 16, "temperature": 1, "ignore_eos": True
    }  # fmt: skip
    for _ in range(2):
        begun = time.monotonic()
        client.post("/v1/completions", json=body).raise_for_status()
    return time.monotonic() - begun


def main() -> None:
    """Run the benchmark, print its table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flags", default="", help="more flags of `up`, in one string")
    parser.add_argument(
        "--limit", type=float, default=300, help="seconds after which a start has failed"
    )
    parser.add_argument("--tag", help="suffix of the result's file name")
    args = parser.parse_args()
    starts: dict[str, list[dict[str, float]]] = {"first": [], "later": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as caches:
            for each in starts.values():
                with tempfile.TemporaryDirectory() as folder:
                    each.append(
                        start(Path(folder), Path(caches), shlex.split(args.flags), args.limit)
                    )
                Console().print({step: round(seconds, 2) for step, seconds in each[-1].items()})
    result: dict[str, Any] = {"arguments": vars(args), "seconds": starts}
    table = Table("seconds to", "first start", "later start")
    for step in STEPS:
        middle = (statistics.median(one[step] for one in each) for each in starts.values())
        table.add_row(step, *(f"{seconds:.1f}" for seconds in middle))
    Console().print(table)
    save("up" if args.tag is None else f"up-{args.tag}", result)


if __name__ == "__main__":
    main()
