"""The processes of a deployment while a benchmark runs: which there were, which ended, and the memory that each took."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from benchmarks._deployment import Deployment

ROOT = Path(__file__).parents[1]
# Whose memory counts against which pod's limit, by the beginning of its role.
PODS = {"gateway": "gateway", "engine": "engine", "training worker": "worker"}
LASTING = ("up", "gateway", "engine front end", "engine core", "training worker")


class Watch:
    """Looks at every process of a deployment: which there were, and the most memory of each."""

    def __init__(self, deployment: Deployment) -> None:
        self.peaks: dict[int, int] = {}
        self.roles: dict[int, str] = {}
        self._deployment, self._ended = deployment, threading.Event()
        first = self.look()
        time.sleep(2)
        self.first = {pid: role for pid, role in self.look().items() if first.get(pid) == role}
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def look(self) -> dict[int, str]:
        """The processes at the moment."""
        roles = self._deployment.processes()
        for pid, role in roles.items():
            self.roles.setdefault(pid, role)
            with suppress(OSError, IndexError):
                status = Path(f"/proc/{pid}/status").read_text()
                kib = int(status.partition("VmHWM:")[2].split()[0])
                self.peaks[pid] = max(kib << 10, self.peaks.get(pid, 0))
        return roles

    def lasting(self) -> dict[str, list[int]]:
        """The pids of those that must not end, at the first look."""
        return {
            role: sorted(pid for pid, role_of_pid in self.first.items() if role_of_pid == role)
            for role in LASTING
        }

    def end(self) -> None:
        """Stop looking."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            self.look()


def ends_and_memory(watch: Watch, last: dict[int, str]) -> dict[str, Any]:
    """Which processes ended, and the most memory of one process of each role beside the limit of its pod."""
    ended = {
        role: [pid for pid in pids if pid not in last] for role, pids in watch.lasting().items()
    }  # fmt: skip
    memory = {}
    for role in sorted(set(watch.roles.values())):
        peaks = [peak for pid, peak in watch.peaks.items() if watch.roles[pid] == role]
        pod = next((pod for name, pod in PODS.items() if role.startswith(name)), None)
        if peaks and pod is not None:
            memory[role] = {"peak_bytes": max(peaks), "limit_bytes": _limit(pod)}
    return {"ended": {role: pids for role, pids in ended.items() if pids}, "memory": memory}


def running(roles: dict[int, str]) -> list[str]:
    """Processes of `up` that run after its end. A pid that another process has by now does not count."""
    left = []
    for pid, role in roles.items():
        with suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if command and Path(f"/proc/{pid}").stat().st_uid == os.getuid() and b"reft" in command:
                left.append(f"{pid} {role}")
    return left


def _limit(pod: str) -> int:
    """The memory limit of a pod's container in deploy/base."""
    units = {"Ki": 10, "Mi": 20, "Gi": 30}
    for each in yaml.safe_load_all((ROOT / "deploy" / "base" / f"{pod}.yaml").read_text()):
        if each["kind"] in ("Deployment", "StatefulSet"):
            (container,) = each["spec"]["template"]["spec"]["containers"]
            text = container["resources"]["limits"]["memory"]
            return int(text[:-2]) << units[text[-2:]]
    raise LookupError(pod)
