"""What the manifests of the `cpu` overlay describe is started here, and a request goes through all of it.

A wrong flag, a variable that nobody reads, a probe of a path that does not exist or a drain that takes too long fails here.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from reft_serve.gateway.engines.engine import NAME_PREFIX
from tests.support.deploy.manifests import workload
from tests.support.deploy.processes import BIN, Container
from tests.support.gateway.process import free_port
from tests.support.paths import ROOT
from tests.support.postgres import postgres_server

DEMO = ROOT / "reft_serve" / "demo"
PROMPT = "once upon a time there was"
UNENDING = {"ignore_eos": True}


@dataclass
class Deployment:
    """The processes, and a key of an admin."""

    folder: Path
    places: dict[str, str]
    secrets: dict[str, str]
    engine: Container
    gateway: Container
    worker: Container
    key: str

    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.gateway.url, headers=headers, timeout=60, trust_env=False)

    def openai(self) -> openai.OpenAI:
        http = openai.DefaultHttpxClient(trust_env=False)
        return openai.OpenAI(
            base_url=f"{self.gateway.url}/v1", api_key=self.key, max_retries=0, http_client=http
        )


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The URL of an empty database."""
    with postgres_server() as server:
        name = f"deploy_{secrets.token_hex(6)}"

        async def create() -> None:
            driver = server.replace("postgresql://", "postgresql+asyncpg://")
            engine = create_async_engine(driver, isolation_level="AUTOCOMMIT")
            async with engine.connect() as connection:
                await connection.execute(text(f"CREATE DATABASE {name}"))
            await engine.dispose()

        asyncio.run(create())
        yield f"{server.rpartition('/')[0]}/{name}"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, database: str) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("cluster")
    engine_port, gateway_port, worker_port = free_port(), free_port(), free_port()
    places = {
        "reft-engine:8000": f"localhost:{engine_port}", "--port=8000": f"--port={engine_port}", "8080": str(gateway_port),
        "--port=8090": f"--port={worker_port}",
        "0.0.0.0": "127.0.0.1", "/models/demo": str(DEMO / "model"), "/var/lib/reft-serve": str(folder / "volumes"),
        # Compiled kernels are kept in it: the machine's own saves the time to make them anew.
        "/var/cache/reft-serve": str(Path.home()),
    }  # fmt: skip
    given = {
        "database": database, "limits-storage": "async+memory://", "engine-key": secrets.token_hex(16),
        "engine-key-next": secrets.token_hex(16),
    }  # fmt: skip
    running: list[Container] = []

    def start(name: str, port: int | None = None, *more: str) -> Container:
        running.append(Container(workload("cpu", name), folder, places, given, port, more=more))
        return running[-1]

    try:
        # It takes longest; without a compiler, a minute less.
        engine = start("reft-engine", engine_port, "--enforce-eager")
        early = start(
            "reft-gateway", gateway_port
        )  # its Deployment does not wait for the Job, and starts it again
        assert early.finish(60) != 0
        assert "reft-serve admin migrate" in early.tail()
        migration = start("reft-migration")
        assert migration.finish(60) == 0, migration.tail()
        gateway = start("reft-gateway", gateway_port)
        worker = start("reft-worker", worker_port)
        gateway.await_probe("startup")
        key = _first_key(migration)
        engine.await_probe("startup")
        yield Deployment(folder, places, given, engine, gateway, worker, key)
    finally:
        for each in running:
            each.stop()


def _first_key(migration: Container) -> str:
    """A tenant and a key, as the documentation says: reft-serve admin, in a container of the gateway's image."""

    def admin(*words: str) -> str:
        done = subprocess.run(
            [BIN / "reft-serve", "admin", *words], env=migration.environment | {"REFT_MIGRATE": "false"},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    admin("tenant", "create", "acme")
    return admin("key", "create", "acme", "--role", "admin")


def test_a_request_goes_through_gateway_engine_store_and_database(deployment: Deployment) -> None:
    for each in (deployment.engine, deployment.gateway, deployment.worker):
        each.await_probe("readiness")
        assert each.probe("liveness")
    with deployment.http() as http:
        files = [
            ("files", (file.name, file.read_bytes()))
            for file in sorted((DEMO / "adapters" / "cats").iterdir())
        ]
        made = http.post("/v1/adapters", data={"name": "cats", "alias": "production"}, files=files)
        assert made.status_code == 201, made.text
        answers = {
            model: deployment.openai().completions.create(
                model=model, prompt=PROMPT, max_tokens=12, temperature=0
            )
            for model in ("base", "cats")
        }
        assert answers["base"].choices[0].text != answers["cats"].choices[0].text
        assert http.get("/v1/usage?group_by=model").json()["data"]
        engines = [each for each in http.get("/v1/admin/engines").json()["data"] if each["healthy"]]
        assert len(engines) == 1


def test_other_routers_see_which_adapters_an_engine_works_on(deployment: Deployment) -> None:
    """llm-d and the Gateway API's Inference Extension read it from `vllm:lora_requests_info`."""
    stream = deployment.openai().completions.create(
        model="cats", prompt=PROMPT, max_tokens=400, stream=True, extra_body=UNENDING
    )
    seen: set[str] = set()
    for count, _ in enumerate(stream):
        if count % 20 == 5 and not seen:
            page = httpx.get(f"{deployment.engine.url}/metrics", trust_env=False).text
            lines = [
                line for line in page.splitlines() if line.startswith("vllm:lora_requests_info{")
            ]
            running = [re.findall(r'running_lora_adapters="([^"]*)"', line) for line in lines]
            seen |= {name for names in running for name in names if name}
            assert not lines or 'max_lora="16"' in lines[0]
    assert len(seen) == 1
    assert next(iter(seen)).startswith(NAME_PREFIX)  # the name that gateways know the version by


def test_an_engine_takes_both_of_its_keys_and_no_other(deployment: Deployment) -> None:
    given = deployment.secrets
    for key, status in (
        (given["engine-key"], 200),
        (given["engine-key-next"], 200),
        ("x", 401),
        ("", 401),
    ):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        assert (
            httpx.get(
                f"{deployment.engine.url}/v1/models", headers=headers, trust_env=False
            ).status_code
            == status
        )


def test_no_key_is_in_a_list_of_processes(deployment: Deployment) -> None:
    shown = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended
            shown += path.read_bytes()
    assert b"reft_serve" in shown
    assert not [
        name
        for name in ("engine-key", "engine-key-next")
        if deployment.secrets[name].encode() in shown
    ]


def test_a_worker_without_a_job_ends_at_once(deployment: Deployment) -> None:
    assert "reft_" in httpx.get(f"{deployment.worker.url}/metrics", trust_env=False).text
    deployment.worker.process.send_signal(signal.SIGTERM)
    deployment.worker.finish(20)


def test_a_gateway_leaves_the_service_first_and_ends_in_the_time_that_it_has(
    deployment: Deployment,
) -> None:
    gateway = deployment.gateway
    stream = deployment.openai().completions.create(
        model="base", prompt=PROMPT, max_tokens=60, stream=True, extra_body=UNENDING
    )
    next(stream)
    begun = time.monotonic()
    gateway.process.send_signal(signal.SIGTERM)
    while gateway.probe("readiness"):
        assert time.monotonic() - begun < 2
    assert gateway.probe("liveness")
    assert deployment.openai().completions.create(model="base", prompt=PROMPT, max_tokens=2).choices
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    gateway.finish(gateway.of.spec["terminationGracePeriodSeconds"] / 4)
    assert time.monotonic() - begun >= float(gateway.environment["REFT_NOTICE_SECONDS"]) - 0.5


def test_an_engine_finishes_what_it_has_and_ends(deployment: Deployment) -> None:
    engine = deployment.engine
    headers = {"authorization": f"Bearer {deployment.secrets['engine-key']}"}
    model = httpx.get(f"{engine.url}/v1/models", headers=headers, trust_env=False).json()["data"][
        0
    ]["id"]
    body = {"model": model, "prompt": PROMPT, "max_tokens": 300, "stream": True, "ignore_eos": True}
    url = f"{engine.url}/v1/completions"
    with httpx.stream(
        "POST", url, json=body, headers=headers, timeout=120, trust_env=False
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        engine.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    engine.finish(60)
