"""A deployment of processes on this machine: gateways behind a balancer, engines behind a name, one database, one store."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from reft_serve.testing import FakeEngine
from tests.support.deploy.balancer import Balancer
from tests.support.gateway.harness import Served, adapter_files
from tests.support.gateway.process import free_port
from tests.support.paths import ROOT

NAME = "engines.reft.test"
# The cluster's name service: a file with the addresses that NAME stands for.
_RESOLVER = """
import pathlib, runpy, socket, sys
real, zone = socket.getaddrinfo, pathlib.Path({zone!r})

def answer(host, port, *rest, **options):
    if host != {name!r}:
        return real(host, port, *rest, **options)
    found = zone.read_text().split()
    if not found:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

socket.getaddrinfo = answer
sys.argv[1:] = ["--port", "{port}"]
runpy.run_module("reft_serve.cli.gateway", run_name="__main__")
"""
_NOTICE_LIMIT = 30.0


class Site:
    """Begins with nothing; `package` is where `reft_serve` lies that its processes run."""

    def __init__(self, folder: Path, database: str, **settings: str) -> None:
        self.folder, self.package = folder, ROOT
        self.zone = folder / "zone"
        self.zone.write_text("")
        self.balancer = Balancer()
        self.gateways: dict[int, subprocess.Popen[bytes]] = {}
        self.engines: dict[str, Served] = {}
        self._engine_port, self._engines_made = 0, 0
        self.settings = {
            "REFT_DATABASE": database, "REFT_STORE": str(folder / "store"), "REFT_MIGRATE": "false",
            "REFT_PROBE_SECONDS": "0.2", "REFT_NOTICE_SECONDS": "2", **settings,
        }  # fmt: skip

    def start_engine(self) -> FakeEngine:
        """A new engine at an address of its own, which holds no version; then its name says so."""
        self._engines_made += 1
        address = f"127.0.0.{self._engines_made}"
        fake = FakeEngine(token_seconds=0.005)
        self.engines[address] = Served(fake.app, address, self._engine_port)
        self._engine_port = self.engines[address].port
        self.zone.write_text("\n".join(self.engines))
        self._noticed("found an engine", address)
        return fake

    def _noticed(self, event: str, address: str) -> None:
        """Wait for what minReadySeconds and preStop leave time for: every gateway has seen the engine come or go."""
        until = time.monotonic() + _NOTICE_LIMIT
        for port in self.gateways:
            log = self.folder / f"gateway-{port}.log"
            while not any(
                event in line and f"//{address}:" in line for line in log.read_text().splitlines()
            ):
                assert time.monotonic() < until, (
                    f"gateway {port} has not reported {event!r} for {address}"
                )
                time.sleep(0.05)

    def stop_engine(self, address: str) -> None:
        """As a cluster ends a pod: it is out of its name first, then sleeps (preStop), then finishes what it has."""
        leaving = self.engines.pop(address)
        self.zone.write_text("\n".join(self.engines))
        self._noticed("an engine was removed", address)
        leaving.stop()

    def start_gateway(self) -> int:
        """A new gateway, once the balancer sends it connections; its port."""
        port = free_port()
        code = _RESOLVER.format(zone=str(self.zone), name=NAME, port=port)
        given = {
            "REFT_ENGINES": f"dns+http://{NAME}:{self._engine_port}",
            "REFT_GATEWAY_NAME": f"gateway-{port}",
        }
        with (self.folder / f"gateway-{port}.log").open("wb") as log:
            self.gateways[port] = subprocess.Popen(
                [sys.executable, "-c", code],
                env=self._environment() | given,
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        self.balancer.add(port)
        return port

    def stop_gateway(self, port: int) -> None:
        """As a cluster ends a pod: by SIGTERM; it leaves the balancer by its own word."""
        running = self.gateways.pop(port)
        running.terminate()
        running.wait(30)
        self.balancer.remove(port)

    def admin(self, *words: str, **settings: str) -> str:
        """`reft-serve admin ...`; what it printed."""
        done = subprocess.run(
            [sys.executable, "-c", "from reft_serve.cli.app import main; main()", "admin", *words],
            env=self._environment() | settings, capture_output=True, text=True, timeout=60, check=False,
            cwd=self.folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def http(self, key: str) -> httpx.Client:
        """A client of the balancer."""
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(
            base_url=self.balancer.url, headers=headers, timeout=30, trust_env=False
        )

    def upload(self, key: str, names: Sequence[str]) -> None:
        """An adapter for each name."""
        with self.http(key) as client:
            for seed, name in enumerate(names, 1):
                parts = [
                    ("files", (file, content)) for file, content in adapter_files(seed).items()
                ]
                made = client.post(
                    "/v1/adapters", data={"name": name, "alias": "production"}, files=parts
                )
                assert made.status_code == 201, made.text

    def next_release(self, migration: str) -> None:
        """Let processes that start from now on be of a release with one more migration."""
        self.package = self.folder / "next"
        shutil.copytree(
            ROOT / "reft_serve", self.package / "reft_serve",
            ignore=shutil.ignore_patterns("__pycache__", "demo"),
        )  # fmt: skip
        versions = self.package / "reft_serve" / "database" / "migrations" / "versions"
        (versions / "9999_next.py").write_text(migration)

    def stop(self) -> None:
        """End everything."""
        for running in self.gateways.values():
            running.kill()
            running.wait(10)
        self.balancer.stop()
        for served in self.engines.values():
            served.stop()

    def _environment(self) -> dict[str, str]:
        return os.environ | self.settings | {"PYTHONPATH": str(self.package)}
