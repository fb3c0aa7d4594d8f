"""The gateway as a process: what it needs to start, what it logs, and what it leaves when it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Served
from tests.support.gateway.permissions import readable_by_others
from tests.support.gateway.process import free_port, process
from tests.support.gateway.up_process import DEMO
from tests.support.waiting import wait_for

_WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "vllm", "transformers", "numpy", "safetensors", "peft"}:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def served() -> Iterator[tuple[FakeEngine, str]]:
    engine = FakeEngine()
    server = Served(engine.app)
    yield engine, server.url
    server.stop()


@pytest.fixture
def key(tmp_path: Path) -> str:
    """An admin's key in the database that `process` uses."""
    prepared = Gateway(tmp_path, "http://127.0.0.1:1")
    prepared.stop()
    return prepared.admin_key


def test_it_starts_answers_and_logs_json_without_torch_vllm_or_transformers(
    tmp_path: Path, served: tuple[FakeEngine, str], key: str
) -> None:
    with process(tmp_path, served[1], _WITHOUT) as (_, url):
        headers = {"authorization": f"Bearer {key}"}
        answer = httpx.post(
            f"{url}/v1/completions",
            json={"model": "base", "prompt": "private words"},
            headers=headers,
            trust_env=False,
        )
        assert answer.status_code == 200
        written = tmp_path / "gateway.log"
        wait_for(lambda: "/v1/completions" in written.read_text())
        log = written.read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    (line,) = [line for line in lines if line.get("path") == "/v1/completions"]
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["status"], line["tenant"], line["level"]) == (200, "operator", "info")
    assert key not in log
    assert "private words" not in log


def test_what_it_writes_is_readable_by_its_owner_alone(
    tmp_path: Path, served: tuple[FakeEngine, str], key: str
) -> None:
    headers = {"authorization": f"Bearer {key}"}
    for name in ("store", "blobs"):  # those of the gateway, in this process, that made the key
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    files = [
        ("files", (file.name, file.read_bytes()))
        for file in sorted((DEMO / "adapters" / "cats").iterdir())
    ]
    with (
        process(tmp_path, served[1]) as (_, url),
        httpx.Client(base_url=url, trust_env=False, headers=headers) as client,
    ):
        made = client.post("/v1/adapters", data={"name": "cats"}, files=files)
        assert made.status_code == 201, made.text
        rows = ("rows.jsonl", b'{"prompt": "a", "completion": "b"}')
        assert (
            client.post(
                "/v1/files", data={"purpose": "fine-tune"}, files={"file": rows}
            ).status_code
            == 200
        )
        new = [each for each in readable_by_others(tmp_path) if not each.startswith("gateway.log")]
    assert not new


@pytest.mark.parametrize(
    ("name", "value", "phrase"),
    [
        ("REFT_DATABASE", "mysql://x", "sqlite:///PATH"), ("REFT_QUEUE_SECONDS", "-1", "REFT_QUEUE_SECONDS"),
        ("REFT_DATABASE", "postgresql://u:hidden@127.0.0.1:1/x", "database error"), ("REFT_STORE", "/proc/x", "store"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_used_is_told_at_start(
    tmp_path: Path, name: str, value: str, phrase: str
) -> None:
    settings = {
        "REFT_DATABASE": f"sqlite:///{tmp_path}/x.db",
        "REFT_STORE": str(tmp_path / "store"),
        name: value,
    }
    command = [sys.executable, "-m", "reft_serve.cli.gateway", "--port", str(free_port())]
    ended = subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode != 0
    assert phrase in ended.stderr
    assert "hidden" not in ended.stderr


def test_killed_in_the_middle_of_streams_it_loses_and_doubles_no_record(
    tmp_path: Path, served: tuple[FakeEngine, str], key: str
) -> None:
    """Each round: streams at different stages, kill -9, a new process; every request that began is counted once."""
    engine, engine_url = served
    engine.token_seconds = 0.01
    headers = {"authorization": f"Bearer {key}"}
    begun: list[str] = []
    finished: list[str] = []
    for _ in range(2):
        with (
            process(tmp_path, engine_url) as (running, url),
            httpx.Client(trust_env=False, headers=headers) as client,
        ):
            done = _streams(client, url, 12, 5)
            finished += done
            begun += done
            opened = [_open(client, url, 500) for _ in range(20)]
            begun += [response.headers["x-request-id"] for response, _ in opened]
            running.send_signal(signal.SIGKILL)
            running.wait()
            for _, rest in opened:
                with pytest.raises(httpx.HTTPError):
                    list(rest)
        wait_for(lambda: engine.running == 0)
    with process(tmp_path, engine_url) as (_, url):
        found = httpx.get(
            f"{url}/v1/usage?group_by=status", headers=headers, trust_env=False
        ).json()["data"]
        rows = {each["group"]["status"]: each for each in found}
    assert rows["completed"]["requests"] == len(finished) == 24
    assert rows["completed"]["completion_tokens"] == 24 * 5
    assert rows["interrupted"]["requests"] == 40
    assert len(set(begun)) == 64


def _open(client: httpx.Client, url: str, tokens: int) -> tuple[httpx.Response, Iterator[bytes]]:
    body = {"model": "base", "prompt": "x", "max_tokens": tokens, "stream": True}
    response = client.send(
        client.build_request("POST", f"{url}/v1/completions", json=body), stream=True
    )
    rest = response.iter_raw()
    next(rest)
    return response, rest


def _streams(client: httpx.Client, url: str, count: int, tokens: int) -> list[str]:
    done = []
    for _ in range(count):
        body: dict[str, Any] = {
            "model": "base",
            "prompt": "x",
            "max_tokens": tokens,
            "stream": True,
        }
        answer = client.post(f"{url}/v1/completions", json=body)
        assert answer.text.endswith("data: [DONE]\n\n")
        done.append(answer.headers["x-request-id"])
    return done
