"""The example of fine-tuning, as a stranger runs it: one command for the servers, one script with the `openai` client."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from examples.fine_tune import ANSWERS
from tests.docs.blocks import ROOT


@contextmanager
def up(folder: Path, seconds: float = 300) -> Iterator[dict[str, str]]:
    """`reft-serve up` with the shipped model, not compiled, so that it is there sooner; the environment that points a client
    at it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "up.log"
    command = [sys.executable, "-m", "reft_serve.cli_up", "--data", str(folder / "data"), "--port", str(port)]
    begun = time.monotonic()
    with log.open("wb") as into:
        process = subprocess.Popen([*command, "--dtype", "float32", "--enforce-eager"], stdout=into, stderr=into)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as probe:
            while not _ready(probe):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < begun + seconds, log.read_text()[-4000:]
                time.sleep(0.2)
        key = re.search(r"rk-[\w-]{43}", log.read_text())
        assert key
        yield os.environ | {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": key[0], "NO_PROXY": "*"}
        assert key[0] not in log.read_text().replace(key[0], "", 1), "the key is shown once"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _ready(probe: httpx.Client) -> bool:
    try:
        return probe.get("/health/ready").status_code == 200
    except httpx.HTTPError:
        return False


def test_a_script_trains_and_asks_a_tuned_model_within_three_minutes(tmp_path: Path) -> None:
    begun = time.monotonic()
    with up(tmp_path) as environment:
        ready = time.monotonic()
        script = [sys.executable, str(ROOT / "examples" / "fine_tune.py")]
        ended = subprocess.run(
            script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        done = time.monotonic()
        _refuses_what_the_engine_would(environment)
    print(f"up was ready after {ready - begun:.0f} s, the script took {done - ready:.0f} s\n{ended.stdout}")
    assert ended.returncode == 0, ended.stdout + ended.stderr + (tmp_path / "up.log").read_text()[-4000:]
    for told in (
        "Fine-tuning job started",
        "Checkpoint saved",
        "The job has successfully completed",
        ":ckpt-step-20: loss",
    ):
        assert told in ended.stdout
    for question, answer in ANSWERS.items():
        before, after = re.findall(rf"{re.escape(question)}\n  before: (.*)\n  after:  (.*)\n", ended.stdout)[0]
        assert before != answer
        assert after == answer
    assert done - ready < 180


def _refuses_what_the_engine_would(environment: dict[str, str]) -> None:
    transport = openai.DefaultHttpxClient(trust_env=False)
    client = openai.OpenAI(
        base_url=environment["OPENAI_BASE_URL"], api_key=environment["OPENAI_API_KEY"], http_client=transport
    )
    file = next(iter(client.files.list(purpose="fine-tune")))
    wrong: tuple[Any, ...] = ({"rank": 17}, {"lora_rank": 1}, {"layers": [99]})
    for setting in wrong:
        with pytest.raises(openai.BadRequestError, match=r"the engines here serve|the base model has") as refused:
            client.fine_tuning.jobs.create(model="base", training_file=file.id, hyperparameters=setting)
        assert refused.value.param == f"hyperparameters.{next(iter(setting))}"
