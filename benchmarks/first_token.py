"""From a job's success to the first token of its version, and what a first use costs the streams
beside it.

`reft-serve up` with the shipped model trains small jobs. As soon as one is seen to have succeeded,
its `fine_tuned_model` is asked for by name, for the first time. Then streams of the base model run,
and a checkpoint of the job, which the engine has never held either, is asked for; as a control, a
version that the engine holds already is asked for in the same way. What the streams feel more of
the first than of the second is the load's own doing.

  scripts/bench first_token
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks._deployment import Deployment
from benchmarks._report import save

_WORDS = ("bird", "cat", "tree", "river")


class Streams:
    """Streams of the base model, one after another in each lane, and when each of their tokens
    came.
    """

    def __init__(self, http: httpx.AsyncClient, lanes: int) -> None:
        self._http, self.came = http, [[] for _ in range(lanes)]
        self._running = [asyncio.create_task(self._lane(lane)) for lane in self.came]

    async def _lane(self, came: list[float]) -> None:
        while True:
            async for _ in tokens(self._http, "base", 512):
                came.append(time.perf_counter())
            came.append(float("nan"))  # the pause between two streams is none of a stream's

    def longest_gap(self, begin: float, end: float) -> float:
        """Milliseconds of the longest wait for a token of any stream that overlaps the window."""
        gaps = [
            after - before
            for came in self.came
            for before, after in pairwise(came)
            if after > begin and before < end
        ]
        return 1e3 * max(gaps, default=float("nan"))

    async def stop(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


async def tokens(http: httpx.AsyncClient, model: str, count: int) -> AsyncIterator[str]:
    """The pieces of a streamed completion."""
    body = {
        "model": model,
        "prompt": "Once upon a time",
        "max_tokens": count,
        "stream": True,
        "ignore_eos": True,
    }
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    yield choice["text"]


async def first_token(http: httpx.AsyncClient, model: str) -> tuple[float, float]:
    """When it was asked for, and when its first token came."""
    begun = time.perf_counter()
    async for _ in tokens(http, model, 4):
        return begun, time.perf_counter()
    raise AssertionError("no token came")


async def train(http: httpx.AsyncClient, file_id: str, seed: int) -> tuple[dict[str, Any], float]:
    """A job that has succeeded, and when that was seen."""
    settings = {"n_epochs": 2, "batch_size": 4}
    method = {"type": "supervised", "supervised": {"hyperparameters": settings}}
    body = {
        "model": "base",
        "training_file": file_id,
        "seed": seed,
        "method": method,
        "suffix": f"trial-{seed}",
    }
    created = await http.post("/v1/fine_tuning/jobs", json=body)
    assert created.status_code == 200, created.text
    while True:
        job = (await http.get(f"/v1/fine_tuning/jobs/{created.json()['id']}")).json()
        if job["status"] in ("succeeded", "failed", "cancelled"):
            assert job["status"] == "succeeded", job
            return job, time.perf_counter()
        await asyncio.sleep(0.01)


async def measure(url: str, key: str, rounds: int, lanes: int) -> dict[str, Any]:
    """Every round: a job, its version's first token, and the control's."""
    headers = {"authorization": f"Bearer {key}"}
    seconds: dict[str, list[float]] = {
        name: [] for name in ("first_token_s", "new_gap_ms", "known_gap_ms", "calm_gap_ms")
    }
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=120, trust_env=False
    ) as http:
        rows = [
            {"prompt": f"Tell me of a {word} {k}", "completion": f" A {word}."}
            for k in range(4)
            for word in _WORDS
        ]
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        uploaded = await http.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("data.jsonl", data)}
        )
        assert uploaded.status_code == 200, uploaded.text
        known = (await train(http, uploaded.json()["id"], 0))[0]["fine_tuned_model"]
        await first_token(http, known)
        for number in range(1, rounds + 1):
            job, seen = await train(http, uploaded.json()["id"], number)
            seconds["first_token_s"].append(
                (await first_token(http, job["fine_tuned_model"]))[1] - seen
            )
            listed = (await http.get(f"/v1/fine_tuning/jobs/{job['id']}/checkpoints")).json()[
                "data"
            ]
            # the earliest, whose weights are not the version's
            new = listed[-1]["fine_tuned_model_checkpoint"]
            streams = Streams(http, lanes)
            await asyncio.sleep(3)
            windows = []
            for model in (new, known):
                windows.append(await first_token(http, model))
                await asyncio.sleep(1.5)
            end = windows[1][1] + 0.5
            await streams.stop()
            seconds["new_gap_ms"].append(streams.longest_gap(*windows[0]))
            seconds["known_gap_ms"].append(streams.longest_gap(*windows[1]))
            seconds["calm_gap_ms"].append(
                streams.longest_gap(end, end + windows[0][1] - windows[0][0])
            )
    return seconds


def main() -> None:
    """Run, print the table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=4, help="streams of the base model beside")
    parser.add_argument("--start-seconds", type=float, default=240.0)
    parser.add_argument("--tag", help="suffix of the result's file name")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started ends, too
    with tempfile.TemporaryDirectory() as folder:
        running = Deployment(Path(folder), [], args.start_seconds, REFT_POLL_SECONDS="0.2")
        try:
            measured = asyncio.run(measure(running.url, running.key, args.rounds, args.streams))
        finally:
            running.stop()
    table = Table("", "median", "largest")
    for name, values in measured.items():
        table.add_row(name, f"{statistics.median(values):.3g}", f"{max(values):.3g}")
    added = [
        new - was for new, was in zip(measured["new_gap_ms"], measured["known_gap_ms"], strict=True)
    ]
    table.add_row(
        "new_gap_ms - known_gap_ms", f"{statistics.median(added):.3g}", f"{max(added):.3g}"
    )
    Console().print(table)
    save(
        "first-token" if args.tag is None else f"first-token-{args.tag}",
        {"arguments": vars(args), **measured},
    )


if __name__ == "__main__":
    main()
