"""The processes that `reft-serve up` starts end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_UP = """
import asyncio
from reft_serve.cli.supervisor import SupervisedProcess
asyncio.run(SupervisedProcess("sleeper", ["sh", "-c", "echo $$; exec sleep 120"], {"PATH": "/usr/bin:/bin"}).keep())
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="asks Linux to signal a process whose parent has died"
)
def test_a_child_ends_with_an_up_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", _UP], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and _state(child) != "Z":
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.02)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except FileNotFoundError:
        return "Z"
