"""The gateway as a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.waiting import wait_for


class Process:
    """A gateway as a process of its own, which can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.environment = os.environ | {
            "REFT_DATABASE": f"sqlite:///{folder / 'reft.db'}", "REFT_STORE": str(folder / "store"),
            "REFT_ENGINES": "http://127.0.0.1:1", "REFT_UPKEEP_SECONDS": "0.2", "REFT_LOG_LEVEL": "ERROR",
        }  # fmt: skip
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "reft_serve.cli.gateway", "--port", str(self.port)]
        self.process = subprocess.Popen(command, env=self.environment)
        wait_for(self._lives, 60)

    def _lives(self) -> bool:
        try:
            return (
                httpx.get(f"http://127.0.0.1:{self.port}/health/live", trust_env=False).status_code
                == 200
            )
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def process(
    folder: Path, engine: str, before: str = "", **settings: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A gateway process over an engine; `before` is Python that runs first."""
    port = free_port()
    given = {
        "REFT_DATABASE": f"sqlite:///{folder / 'reft.db'}", "REFT_STORE": str(folder / "store"), "REFT_ENGINES": engine,
        "REFT_GATEWAY_NAME": "test", "REFT_PROBE_SECONDS": "0.2", **settings,
    }  # fmt: skip
    code = f"{before}\nimport runpy, sys\nsys.argv[1:] = ['--port', '{port}']\n"
    code += "runpy.run_module('reft_serve.cli.gateway', run_name='__main__')"
    with (folder / "gateway.log").open("ab") as log:
        running = subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | given, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert running.poll() is None, (folder / "gateway.log").read_text()
            assert time.monotonic() < deadline, (folder / "gateway.log").read_text()
            time.sleep(0.05)
        yield running, url
    finally:
        if running.poll() is None:
            running.terminate()
            running.wait(20)


@contextmanager
def listening(command: list[str], port: int, **settings: str) -> Iterator[int]:
    """A server process's id, from its first answer to the end of the block."""
    with tempfile.TemporaryFile() as log:
        running = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 240
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                if running.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"a server did not start:\n{log.read().decode()[-4000:]}")
                time.sleep(0.05)
            time.sleep(1.0)
            yield running.pid
        finally:
            running.terminate()
            running.wait()
