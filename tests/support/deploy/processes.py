"""Processes started as a kubelet starts containers: by command, environment and probes, at paths
and ports from here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from tests.support.deploy.manifests import Workload, command, environment

BIN = Path(sys.executable).parent


class Container:
    """One container of a workload, running here.

    `places` says what stands for what: each of its keys, found in a word of the command or in a
    variable, is replaced. `added` are variables that a controller or the machine adds to those of
    the manifest, `more` words after its command.
    """

    def __init__(
        self,
        of: Workload,
        folder: Path,
        places: Mapping[str, str],
        secrets: Mapping[str, str],
        port: int | None = None,
        added: Mapping[str, str] | None = None,
        more: Sequence[str] = (),
    ) -> None:
        self.of, self.port, self.log, self._places = of, port, folder / f"{of.name}.log", places
        found = environment(of, secrets) | dict(added or {})
        self.words = [_moved(word, places) for word in [*command(of, found), *more]]
        variables = {name: _moved(value, places) for name, value in found.items()}
        # Of this process's own environment only what a machine needs: what the manifest forgets is
        # missing here too.
        own = {
            name: os.environ[name]
            for name in ("LD_LIBRARY_PATH", "OMP_NUM_THREADS")
            if name in os.environ
        }
        self.environment = own | {"HOME": str(folder), "PATH": f"{BIN}:/usr/bin:/bin"} | variables
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.words, env=self.environment, cwd="/", stdout=log, stderr=log, process_group=0
            )

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def probe(self, name: str) -> bool:
        """Whether a probe succeeds."""
        probe = self.of.container[f"{name}Probe"]
        try:
            answer = httpx.get(
                self.url + probe["httpGet"]["path"],
                timeout=probe.get("timeoutSeconds", 1),
                trust_env=False,
            )
        except httpx.HTTPError:
            return False
        return 200 <= answer.status_code < 400

    def await_probe(self, name: str) -> None:
        """Wait for a probe to succeed, as long as its container may take for it."""
        probe = self.of.container[f"{name}Probe"]
        deadline = time.monotonic() + probe.get("periodSeconds", 10) * probe.get(
            "failureThreshold", 3
        )
        while not self.probe(name):
            assert self.process.poll() is None, self.tail()
            assert time.monotonic() < deadline, f"the {name} probe never succeeded: {self.tail()}"
            time.sleep(0.1)

    def hook(self, name: str) -> subprocess.Popen[bytes]:
        """Start the command of a lifecycle hook beside it."""
        words = [
            _moved(word, self._places)
            for word in self.of.container["lifecycle"][name]["exec"]["command"]
        ]
        return subprocess.Popen(words, env=self.environment, cwd="/")

    def finish(self, seconds: float) -> int:
        """Wait for its end."""
        return self.process.wait(seconds)

    def stop(self, seconds: float = 30.0) -> None:
        """End it, and whatever it has started."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def tail(self) -> str:
        """The end of its log."""
        return f"{self.words}\n{self.log.read_text(errors='replace')[-4000:]}"


def _moved(word: str, places: Mapping[str, str]) -> str:
    for there, here in places.items():
        word = word.replace(there, here)
    return word
