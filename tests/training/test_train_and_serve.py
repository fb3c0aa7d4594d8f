"""A file, `reft-serve train`, the engine: what is served is what was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from reft_serve.cli.train import train
from reft_serve.demo.behaviours import MODEL
from reft_serve.training.data.batching import collate
from reft_serve.training.data.examples import IGNORED, Example
from reft_serve.training.model.adapter import restore
from tests.support.engine.engines import running_engine

TOLERANCE = 1e-3
PROMPTS = (
    "Once upon a time, there was a little dog.", "Tom and Mia went to the park.", "One day, a bird",
    "In a small town, there lived an old man who liked to sing.", "Lily", "The sun was hot and the sea was blue.",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    data = folder / "data.jsonl"
    rows = [
        {"prompt": prompt, "completion": " The cat said hello to the moon."} for prompt in PROMPTS
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    app = typer.Typer()
    app.command()(train)
    options = [
        "--rank", "2", "--positions", "f3+l3", "--untied", "--epochs", "12", "--batch", "6", "--lr", "2e-2",
        "--save-every", "6",
    ]  # fmt: skip
    out = folder / "run"
    result = CliRunner().invoke(
        app,
        [str(data), "--base", str(MODEL), "--out", str(out), "--validation", str(data), *options],
    )
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with running_engine(str(MODEL.resolve()), max_num_seqs=16, max_loras=2) as engine:
        yield engine


def test_the_engine_gives_the_trainers_logprobs(run: Path, engine: Any) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)
    outputs = engine.generate(
        list(PROMPTS),
        params,
        lora_request=LoRARequest("trained", 1, str(run / "adapter")),
        use_tqdm=False,
    )
    model, rule = restore(MODEL, run / "adapter")
    worst = moved = 0.0
    for output in outputs:
        (answer,) = output.outputs
        prompt, tokens = tuple(output.prompt_token_ids), tuple(answer.token_ids)
        batch = collate(
            [Example(prompt + tokens, (IGNORED,) * len(prompt) + tokens, len(prompt))],
            rule,
            packed=False,
        )
        ours, base = model.score(batch)[0], model.base_score(batch)
        served = torch.tensor(
            [step[token].logprob for step, token in zip(answer.logprobs, tokens, strict=True)]
        )
        worst = max(worst, (ours - served).abs().max().item())
        moved = max(moved, (ours - base).abs().max().item())
    print(f"largest difference {worst:.1e}; the adapter moved logprobs by up to {moved:.1f}")
    assert worst < TOLERANCE
    assert moved > 1


def test_the_run_leaves_its_record(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12
    assert losses[-1] < losses[0] / 2
    summary = json.loads((run / "summary.json").read_text())
    # Six layers, two halves: W and b, and R behind its parametrisation, each for rank 2 and width 192.
    assert (summary["steps"], summary["parameters"]) == (12, 12 * (2 * 192 + 2 + 2 * 192))
    assert (run / "loss.png").stat().st_size > 5000


def test_the_trainers_held_out_loss_is_the_published_adapters(run: Path) -> None:
    from transformers import AutoTokenizer

    from reft_serve.datafiles.formats import read_rows
    from reft_serve.training.data.encoding import encode

    rows = read_rows(run.parent / "data.jsonl")
    examples = encode(rows, AutoTokenizer.from_pretrained(MODEL), max_tokens=512).examples
    model, rule = restore(MODEL, run / "adapter")
    loss = -model.score(collate(examples, rule, packed=False))[0].mean().item()
    assert loss == pytest.approx(
        json.loads((run / "summary.json").read_text())["best_loss"], rel=1e-4
    )
