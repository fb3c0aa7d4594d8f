"""How long `reft-serve up` takes from nothing to the first answer of an adapter that was uploaded over the API.

Each start has a new data directory and new compile caches, as the first start on a machine has. The clock runs from the
command to the last token of the answer: every process's imports, the first key, the engine with the shipped model, the
upload of one of the shipped adapters, one completion. The second start of each round keeps the caches, as every later one.

  scripts/bench up
  scripts/bench up --flags="--enforce-eager" --tag eager
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

import reft_serve.demo
from benchmarks._report import save

ADAPTER = Path(reft_serve.demo.__file__).parent / "adapters" / "birds"
PROMPT = "Once upon a time there was a little"
STEPS = ("first key", "live", "ready", "adapter uploaded", "first answer", "16 streams of 64 tokens")


def start(folder: Path, caches: Path, flags: list[str], limit: float) -> dict[str, float]:
    """Seconds from the command to each of STEPS, but for the last, which is a duration."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(Path(sys.executable).with_name("reft-serve"))
    command = [script, "up", "--data", str(folder / "data"), "--port", str(port), *flags]
    settings = {"VLLM_CACHE_ROOT": str(caches / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    begun = time.monotonic()
    log = (folder / "up.log").open("wb")
    running = subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=log, text=True)
    watchdog = threading.Timer(limit, running.kill)
    watchdog.start()
    try:
        assert running.stdout is not None
        key = next((found[0] for line in running.stdout if (found := re.search(r"rk-[\w-]{43}", line))), None)
        assert key, (folder / "up.log").read_text()
        found = {"first key": time.monotonic() - begun}
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=limit, trust_env=False
        ) as client:
            for step, path in (("live", "/health/live"), ("ready", "/health/ready")):
                while status(client, path) != 200:
                    assert running.poll() is None, (folder / "up.log").read_text()
                    time.sleep(0.05)
                found[step] = time.monotonic() - begun
            files = [("files", (file.name, file.read_bytes())) for file in sorted(ADAPTER.iterdir())]
            client.post("/v1/adapters", data={"name": "birds"}, files=files).raise_for_status()
            found["adapter uploaded"] = time.monotonic() - begun
            body = {"model": "birds", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
            answer = client.post("/v1/completions", json=body).raise_for_status().json()
            found["first answer"] = time.monotonic() - begun
            assert answer["model"] == "birds"
            assert answer["choices"][0]["text"].strip()
            found["16 streams of 64 tokens"] = decoding(client)
        return found
    finally:
        watchdog.cancel()
        running.send_signal(signal.SIGINT)
        running.wait(120)
        log.close()


def status(client: httpx.Client, path: str) -> int:
    """The answer's status; 0 where nobody answers."""
    try:
        return client.get(path, timeout=5).status_code
    except httpx.HTTPError:
        return 0


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flags", default="", help="more flags of `up`, in one string")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a start has failed")
    parser.add_argument("--tag", help="suffix of the result's file name")
    args = parser.parse_args()
    starts: dict[str, list[dict[str, float]]] = {"first": [], "later": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as caches:
            for each in starts.values():
                with tempfile.TemporaryDirectory() as folder:
                    each.append(start(Path(folder), Path(caches), shlex.split(args.flags), args.limit))
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
