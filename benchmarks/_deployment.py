"""`reft-serve up` as a process of this machine: tenants and adapters in it, its memory, and a Prometheus that watches it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

import reft_serve.demo
from tests.support.deploy.open_loop import Tenant
from tests.support.gateway.process import free_port

DEMO = Path(reft_serve.demo.__file__).parent
_READY_SECONDS = 600


class Deployment:
    """A running `reft-serve up` over the shipped model: `flags` go to it, `settings` to its environment.

    `seconds` says when, from the command on, it had shown its first key, lived and was ready.
    """

    def __init__(
        self, folder: Path, flags: list[str], limit: float = _READY_SECONDS, **settings: str
    ) -> None:
        self.port, self.log, self.key = free_port(), folder / "up.log", ""
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            sys.executable,
            "-m",
            "reft_serve.cli.up",
            "--data",
            str(folder / "data"),
            "--port",
            str(self.port),
        ]
        self.seconds: dict[str, float] = {}
        self._http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self._begun = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *flags], stdout=log, stderr=log, env=os.environ | settings
            )
        try:
            self._wait("first key", self._has_key, limit)
            self._http.headers["authorization"] = f"Bearer {self.key}"
            self._wait("live", lambda: self._answers("/health/live"), limit)
            self._wait("ready", lambda: self._answers("/health/ready"), limit)
        except BaseException:
            self.stop()
            raise

    def _wait(self, step: str, reached: Callable[[], bool], limit: float) -> None:
        while not reached():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert self.passed() < limit, (
                f"`up`: no {step} in {limit:g} s:\n{self.log.read_text()[-4000:]}"
            )
            time.sleep(0.05)
        self.seconds[step] = self.passed()

    def passed(self) -> float:
        """Seconds since the command."""
        return time.monotonic() - self._begun

    def _has_key(self) -> bool:
        match = re.search(r"rk-[\w-]{43}", self.log.read_text())
        self.key = match[0] if match else ""
        return match is not None

    def _answers(self, path: str) -> bool:
        try:
            return self._http.get(path).status_code == 200
        except httpx.HTTPError:
            return False

    def tenant(self, name: str, adapters: int, number: int) -> Tenant:
        """Make a tenant with so many adapters, copies of the shipped ones that are versions of their own."""
        tenant = self._http.post("/v1/admin/tenants", json={"name": name}).raise_for_status().json()
        key = (
            self._http.post(f"/v1/admin/tenants/{tenant['id']}/keys", json={"role": "owner"})
            .raise_for_status()
            .json()
        )
        sources = sorted(path for path in (DEMO / "adapters").iterdir() if path.is_dir())
        headers = {"authorization": f"Bearer {key['secret']}"}
        names = []
        for k in range(adapters):
            source = sources[k % len(sources)]
            names.append(f"{source.name}-{k}")
            files = [("files", item) for item in _variant(source, f"{number}.{k}").items()]
            self._http.post(
                "/v1/adapters", data={"name": names[-1]}, files=files, headers=headers
            ).raise_for_status()  # fmt: skip
        return Tenant(name, key["secret"], tuple(names))

    def memory(self) -> dict[str, int]:
        """Resident bytes by process: the gateway, the engine's front end, its core and workers, and `up` itself."""
        peaks: dict[str, int] = {}
        for pid in _tree(self.process.pid):
            with contextlib.suppress(OSError, IndexError):
                resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf(
                    "SC_PAGE_SIZE"
                )
                name = _role(
                    Path(f"/proc/{pid}/cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode(errors="replace")
                )
                peaks[name] = peaks.get(name, 0) + resident
        return peaks

    def processes(self) -> dict[int, str]:
        """What each of its processes is, by pid; one without a name of its own is a helper of the process that started it."""
        roles: dict[int, str] = {}
        waiting = [(self.process.pid, "up")]
        while waiting:
            pid, parent = waiting.pop()
            with contextlib.suppress(OSError):
                role = _role(
                    Path(f"/proc/{pid}/cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode(errors="replace")
                )
                roles[pid] = (
                    role if role != "helpers" else f"{parent.removesuffix(' helper')} helper"
                )
                for task in Path(f"/proc/{pid}/task").iterdir():
                    waiting += [
                        (int(child), roles[pid])
                        for child in (task / "children").read_text().split()
                    ]
        return roles

    def stop(self) -> None:
        """End it as Ctrl-C does."""
        self._http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(90)
            except subprocess.TimeoutExpired:
                self.process.kill()


def _variant(source: Path, mark: str) -> dict[str, bytes]:
    """An adapter's files with a note of its own in the manifest, so that it is another version."""
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    manifest = json.loads(files["reft_config.json"])
    manifest["provenance"] = {**manifest.get("provenance", {}), "copy": mark}
    files["reft_config.json"] = json.dumps(manifest).encode()
    return files


def _tree(pid: int) -> list[int]:
    """A process and all that it started, directly or not."""
    pids = [pid]
    for each in pids:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                pids += [int(child) for child in (task / "children").read_text().split()]
    return pids


def _role(command: str) -> str:
    roles = {
        "cli.up": "up", "cli.gateway": "gateway", "cli.worker": "training worker", "EngineCore": "engine core",
        "Worker": "engine worker", "api_server": "engine front end", "launch.server": "engine front end",
    }  # fmt: skip
    for part, role in roles.items():
        if part in command:
            return role
    return "helpers"


class Prometheus:
    """A Prometheus on loopback that scrapes a deployment through its gateway."""

    def __init__(self, binary: str, folder: Path, deployment: Deployment, seconds: int) -> None:
        self.port = free_port()
        (folder / "key").write_text(deployment.key)
        target = f"127.0.0.1:{deployment.port}"
        jobs = [
            {
                "job_name": name, "metrics_path": path, "static_configs": [{"targets": [target]}],
                "authorization": {"credentials_file": str(folder / "key")},
            }
            for name, path in (("reft-gateway", "/metrics"), ("reft-engine", "/v1/admin/engines/engine-0/metrics"))
        ]  # fmt: skip
        config = {"global": {"scrape_interval": f"{seconds}s"}, "scrape_configs": jobs}
        (folder / "prometheus.json").write_text(json.dumps(config))  # JSON is YAML
        with (folder / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    binary, f"--config.file={folder / 'prometheus.json'}", f"--storage.tsdb.path={folder / 'tsdb'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=log, stderr=log,
            )  # fmt: skip
        self._http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=30, trust_env=False
        )

    def series(
        self, expression: str, begin: float, end: float, step: float
    ) -> list[dict[str, Any]]:
        """What an expression was from `begin` to `end` (seconds since 1970): `metric` and `values` of each series."""
        asked = {"query": expression, "start": begin, "end": end, "step": step}
        answer = self._http.get("/api/v1/query_range", params=asked).raise_for_status().json()
        series: list[dict[str, Any]] = answer["data"]["result"]
        return series

    def stop(self) -> None:
        """End it."""
        self._http.close()
        self.process.terminate()
        self.process.wait(30)


@contextlib.contextmanager
def watching(folder: Path, deployment: Deployment, seconds: int) -> Iterator[Prometheus | None]:
    """A Prometheus for as long as the block lasts; None where there is none on this machine."""
    binary = shutil.which("prometheus")
    if binary is None:
        yield None
        return
    (folder / "prometheus").mkdir()
    running = Prometheus(binary, folder / "prometheus", deployment, seconds)
    try:
        yield running
    finally:
        running.stop()
