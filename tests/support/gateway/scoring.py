"""A small multiple-choice task, its scores in plain Hugging Face with hooks, and lm-evaluation-harness on it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from reft_serve.adapters.directory import Adapter, read_adapter
from tests.support.engine.hooked_llama import HookedLlama
from tests.support.gateway.up_process import DEMO
from tests.support.paths import ROOT

QUESTIONS = (
    ("Once upon a time there was a little", [" cat who liked milk.", " bird in a tall tree."], 0),
    (
        "One morning the two friends went to the lake because",
        [" it was a sunny day.", " the cat said hello."],
        0,
    ),
    ("Lily looked up and", [' said, "Look at the rain!"', " went home."], 1),
)
TASK = """
task: endings
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


class Endings:
    """The questions with their endings."""

    def __init__(self) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(DEMO / "model")
        self._reference = HookedLlama(DEMO / "model")

    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """Each question with each ending, as tokens."""
        return [
            self.tokens(question, ending)
            for question, endings, _ in QUESTIONS
            for ending in endings
        ]

    def tokens(self, question: str, ending: str) -> tuple[list[int], list[int]]:
        """As the harness splits them: what the whole has beyond the question's own tokens is the ending."""
        prompt = self._tokenizer(question, add_special_tokens=False).input_ids
        return prompt, self._tokenizer(question + ending, add_special_tokens=False).input_ids[
            len(prompt) :
        ]

    def expected(self, model: str, prompt: list[int], answer: list[int]) -> list[float]:
        """The log-probability of each token of the answer."""
        rows = self._rows(model, prompt, answer)
        return [float(row[token]) for row, token in zip(rows, answer, strict=True)]

    def is_greedy(self, model: str, prompt: list[int], answer: list[int]) -> bool:
        """Whether each token of the answer is the likeliest one."""
        return [int(row.argmax()) for row in self._rows(model, prompt, answer)] == answer

    def _rows(self, model: str, prompt: list[int], answer: list[int]) -> Any:
        adapter: Adapter | None = (
            None if model == "base" else read_adapter(DEMO / "adapters" / model, 1 << 30)
        )
        return self._reference.logprobs(adapter, prompt, answer)[len(prompt) - 1 :]

    def harness(
        self, python: str, url: str, key: str, model: str, folder: Path
    ) -> dict[tuple[str, str], tuple[float, bool]]:
        """Run lm-evaluation-harness: by question and ending, the score and whether it is the greedy answer."""
        folder.mkdir()
        rows = folder / "endings.jsonl"
        rows.write_text(
            "\n".join(
                json.dumps({"question": q, "choices": c, "label": k}) for q, c, k in QUESTIONS
            )
        )
        (folder / "endings.yaml").write_text(TASK.format(rows=rows))
        given = {
            "model": model, "base_url": f"{url}/v1/completions", "tokenizer": DEMO / "model",
            "tokenizer_backend": "huggingface", "num_concurrent": 2,
        }  # fmt: skip
        command = [
            python, str(ROOT / "examples" / "lm_eval_model.py"), "--model", "reft-completions", "--include_path", str(folder),
            "--tasks", "endings", "--batch_size", "3", "--log_samples", "--output_path", str(folder / "out"),
            "--model_args", ",".join(f"{name}={value}" for name, value in given.items()),
        ]  # fmt: skip
        environment = os.environ | {
            "OPENAI_API_KEY": key,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
        }
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        (samples,) = (folder / "out").rglob("samples_endings_*.jsonl")
        found = {}
        for line in samples.read_text().splitlines():
            sample = json.loads(line)
            for k, ((score, greedy),) in enumerate(sample["resps"]):
                told = sample["arguments"][f"gen_args_{k}"]
                found[told["arg_0"], told["arg_1"]] = (float(score), str(greedy) == "True")
        assert len(found) == sum(len(endings) for _, endings, _ in QUESTIONS)
        return found
