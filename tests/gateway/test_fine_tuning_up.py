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


def test_a_script_trains_and_asks_a_tuned_model_within_three_minutes(tmp_path: Path) -> None:
    # Not compiled, so that it is there sooner.
    up = Up(tmp_path)
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
    finally:
        up.stop()
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
