"""The example of fine-tuning, as a stranger runs it: one command for the servers, one script with
the `openai` client.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from examples.fine_tune import ANSWERS
from tests.support.gateway.up_process import Up
from tests.support.paths import ROOT


@pytest.mark.alone
def test_a_script_trains_and_asks_a_tuned_model_within_three_minutes(tmp_path: Path) -> None:
    up = Up(tmp_path, "--plain", VLLM_LOGGING_LEVEL="INFO")
    try:
        environment = {"OPENAI_BASE_URL": f"{up.url}/v1", "OPENAI_API_KEY": up.key, "NO_PROXY": "*"}
        script = [sys.executable, str(ROOT / "examples" / "fine_tune.py")]
        begun = time.monotonic()
        ended = subprocess.run(
            script,
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        took = time.monotonic() - begun
        _refuses_what_the_engine_would(up.openai)
        _continues(up)
    finally:
        begun = time.monotonic()
        up.stop()
    _tells_a_person(up, tmp_path / "data" / "logs", time.monotonic() - begun)
    print(f"up was ready after {up.seconds:.0f} s, the script took {took:.0f} s\n{ended.stdout}")
    assert up.key not in up.log.read_text().replace(up.key, "", 1), "the key is shown once"
    assert ended.returncode == 0, ended.stdout + ended.stderr + up.log.read_text()[-4000:]
    for told in (
        "Fine-tuning job started",
        "Checkpoint saved",
        "The job has successfully completed",
        ":ckpt-step-20: loss",
    ):
        assert told in ended.stdout
    for question, answer in ANSWERS.items():
        before, after = re.findall(
            rf"{re.escape(question)}\n  before: (.*)\n  after:  (.*)\n", ended.stdout
        )[0]
        assert before != answer
        assert after == answer
    assert took < 180


def _continues(up: Up) -> None:
    """A job from the version that the script made: same structure, next version, and its lineage."""
    file = next(iter(up.openai.files.list(purpose="fine-tune")))
    name = "pip@1"
    first = up.http.get("/v1/adapters/pip/versions").json()["data"]
    job = up.openai.fine_tuning.jobs.create(
        model=name,
        training_file=file.id,
        suffix="pip",
        hyperparameters={"n_epochs": 1, "batch_size": 4},
    )
    assert job.model == next(each["model"] for each in first if each["version"] == 1)
    wrong: Any = {"rank": 4}
    with pytest.raises(
        openai.BadRequestError, match="rank is 8 in the model to continue from"
    ) as refused:
        up.openai.fine_tuning.jobs.create(model=name, training_file=file.id, hyperparameters=wrong)
    assert refused.value.param == "hyperparameters.rank"
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.2)
        job = up.openai.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    made = up.http.get("/v1/adapters/pip/versions").json()["data"][0]
    assert made["model"] == job.fine_tuned_model
    assert made["facts"]["rank"] == 8
    assert made["facts"]["lineage"]["parent"] == job.model
    assert made["facts"]["lineage"]["job"] == job.id
    assert len(made["facts"]["lineage"]["data_sha256"]) == 64
    assert up.say(str(job.fine_tuned_model))


def _tells_a_person(up: Up, logs: Path, seconds: float) -> None:
    """What `up` shows on a terminal: stages, requests, a quiet end; the rest is in files."""
    shown = up.log.read_text()
    print(shown)
    for stage in ("start vLLM", "load the model", "start the server"):
        assert re.search(rf"^  ok {stage} +[0-9.]+ s$", shown, re.MULTILINE), shown
    assert "Ready after" in shown
    assert f"curl -s {up.url}/v1/completions" in shown
    assert re.search(
        r"^[0-9:]{8}  200  POST /v1/chat/completions  [0-9.]+ s  \S+  \d+\+\d+ tokens$",
        shown,
        re.MULTILINE,
    )
    assert re.search(r"^Stopped after \d+ s\.$", shown, re.MULTILINE)
    for noise in ("INFO", "WARNING", "Traceback", "leaked", '{"time"'):
        assert noise not in shown
    assert seconds < 30
    whole = "".join((logs / f"{name}.log").read_text() for name in ("engine", "gateway", "worker"))
    assert "Starting to load model" in whole
    # vLLM also writes there, after all its processes ended, that it can read no more from them.
    for violence in ("force killing", "leaked"):
        assert violence not in whole


def _refuses_what_the_engine_would(client: openai.OpenAI) -> None:
    file = next(iter(client.files.list(purpose="fine-tune")))
    wrong: tuple[Any, ...] = ({"rank": 17}, {"lora_rank": 1}, {"layers": [99]})
    for setting in wrong:
        with pytest.raises(
            openai.BadRequestError,
            match=r"the engines support|the engines do not serve LoRA|the base model has",
        ) as refused:
            client.fine_tuning.jobs.create(
                model="base", training_file=file.id, hyperparameters=setting
            )
        assert refused.value.param == f"hyperparameters.{next(iter(setting))}"
