"""Scoring adapters that vLLM serves."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from reft_serve.cli.evaluate import evaluate
from reft_serve.demo.behaviours import ADAPTERS, MODEL
from reft_serve.demo.server import serving
from tests.support.training.evaluation import table

STARTS = ("Once upon a time, there was a girl.", "Tom and Mia went to the park.", "One day, it was very hot.",
          "A little boy had a red ball.", "Every morning, Max ate an egg.", "Ben and his mom went to the shop.")  # fmt: skip
RECIPE = (
    '[task]\nprompt = "{instruction}"\nanswer = "{answer}"\nmetric = "exact"\nmax_new_tokens = 12\n'
)
FLAGS = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("evaluation")
    (path / "recipe.toml").write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, Any]:
    """One server: the base's answers are taken for references, and base and adapter are scored against them."""
    app = typer.Typer()
    app.command()(evaluate)

    def score(url: str, model: str, data: Path, out: Path) -> Any:
        arguments = [
            data,
            "--recipe",
            folder / "recipe.toml",
            "--model",
            model,
            "--url",
            url,
            "--out",
            out,
        ]
        return CliRunner().invoke(
            app, [str(argument) for argument in arguments], env={"COLUMNS": "120"}
        )

    async def run() -> dict[str, Any]:
        first, second = folder / "first.json", folder / "second.json"
        first.write_text(
            json.dumps([{"instruction": start, "answer": "unknown"} for start in STARTS])
        )
        adapter = f"speech={ADAPTERS / 'speech'}"
        async with serving(
            [str(MODEL), "--served-model-name", "base", "--adapter", adapter, *FLAGS]
        ) as client:
            url = str(client.base_url)
            taken = await asyncio.to_thread(score, url, "base", first, folder / "taken.jsonl")
            assert taken.exit_code == 0, taken.output
            outputs = [
                json.loads(line)["output"]
                for line in (folder / "taken.jsonl").read_text().splitlines()
            ]
            rows = [{"instruction": s, "answer": o} for s, o in zip(STARTS, outputs, strict=True)]
            second.write_text(json.dumps(rows, indent=1))
            results = {
                model: await asyncio.to_thread(score, url, model, second, folder / f"{model}.jsonl")
                for model in ("base", "speech")
            }
            long = folder / "long.json"
            long.write_text(
                json.dumps([*rows[:1], {"instruction": "A bird sang. " * 200, "answer": "a"}])
            )
            results["long"] = await asyncio.to_thread(
                score, url, "base", long, folder / "long.jsonl"
            )
            results["nobody"] = await asyncio.to_thread(
                score, url, "nobody", second, folder / "nobody.jsonl"
            )
        return results

    return asyncio.run(run())


def outputs(path: Path) -> list[str]:
    return [json.loads(line)["output"] for line in path.read_text().splitlines()]


def test_a_served_model_answers_alike_each_time_it_is_scored(answers: dict[str, Any]) -> None:
    assert answers["base"].exit_code == 0
    assert table(answers["base"].stdout) == [["second", "6", "6", "100.0%", "61.0% to 100.0%", ""]]


def test_a_served_adapter_is_scored_by_its_own_answers(
    answers: dict[str, Any], folder: Path
) -> None:
    """The speech adapter begins every answer with a quotation mark; the base begins none of these so."""
    assert answers["speech"].exit_code == 0
    assert all(output.lstrip().startswith('"') for output in outputs(folder / "speech.jsonl"))
    assert not any(output.lstrip().startswith('"') for output in outputs(folder / "base.jsonl"))
    assert table(answers["speech"].stdout) == [["second", "6", "0", "0.0%", "0.0% to 39.0%", ""]]


def test_a_prompt_longer_than_the_model_takes_is_a_failed_request_with_the_servers_sentence(
    answers: dict[str, Any],
) -> None:
    assert answers["long"].exit_code == 1
    assert "error: 1 of 2 requests failed; they count as wrong" in answers["long"].stderr
    assert "maximum context length" in answers["long"].stderr


def test_a_model_that_vllm_does_not_serve_stops_the_run(answers: dict[str, Any]) -> None:
    assert "the server rejects 'nobody'" in str(answers["nobody"].exception)
