"""The two sides of `benchmarks.train`: processes that read a setup and then jobs, a line of JSON
each, and answer each.

What a side prints beside its answers is dropped; an answer begins with `@@ `.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["ask", "side"]


@contextmanager
def side(command: list[str], setup: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """A side that has been set up; it ends with the block."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        _send(process, setup)
        _answer(process)
        yield process
    finally:
        process.kill()
        process.wait()


def ask(process: subprocess.Popen[str], job: dict[str, Any]) -> dict[str, Any]:
    """One job's answer."""
    _send(process, job)
    answer: dict[str, Any] = json.loads(_answer(process))
    return answer


def _send(process: subprocess.Popen[str], value: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(value) + "\n")
    process.stdin.flush()


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("@@ "):
            return line[3:]
    raise SystemExit(f"{process.args} ended; run it by hand to see why")
