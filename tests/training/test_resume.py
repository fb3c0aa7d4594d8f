"""Training that is killed at any moment and resumed ends in the very weights of an unbroken run."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from reft_serve.adapters.directory import read_adapter
from reft_serve.datafiles.formats import read_rows
from reft_serve.errors import AdapterExists, ClientError
from reft_serve.interventions.positions import PositionRule
from reft_serve.training.data.encoding import encode
from reft_serve.training.data.examples import IGNORED, Example
from reft_serve.training.loop import checkpoints
from reft_serve.training.loop.run import started_at, train
from reft_serve.training.plan import AdapterPlan, LoraPlan, Plan
from tests.support.paths import GOLDEN

BASE = GOLDEN / "models" / "tiny-llama"
# More for a longer trial; ten were run once.
KILLS = int(os.environ.get("REFT_TEST_KILLS", "4"))
# Dropout draws from the random generator in every step, so a wrong state of it shows in the weights.
PLAN = Plan(
    adapter=AdapterPlan("loreft", 2, None, PositionRule("f2+l2", tied=False), dropout=0.2),
    epochs=5, batch=3, accumulate=2, learning_rate=1e-2, save_every=2, keep=2,
)  # fmt: skip

STEPS = 20


def examples(seed: int, count: int) -> list[Example]:
    choose = random.Random(seed)
    found = []
    for _ in range(count):
        prompt_len = choose.randint(4, 20)
        ids = tuple(choose.randint(3, 299) for _ in range(prompt_len + choose.randint(1, 6)))
        found.append(Example(ids, (IGNORED,) * prompt_len + ids[prompt_len:], prompt_len))
    return found


class Reporter:
    """Tells a pipe of every step, so that a kill can be timed."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def started(self, step: int, steps: int) -> None:
        self.pipe.send(step)

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        if "loss" in metrics:
            self.pipe.send(step)

    def saved(self, step: int, path: Path) -> None: ...

    def wants_stop(self) -> bool:
        return False


def run(out: Path, pipe: object) -> None:
    torch.set_num_threads(1)  # as in this process: the order of sums depends on it
    train(
        BASE,
        PLAN,
        examples(0, 22),
        out,
        held_out=examples(1, 5),
        resume=True,
        watchers=[Reporter(pipe)],
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    train(BASE, PLAN, examples(0, 22), out, held_out=examples(1, 5))
    return out


def test_killed_at_random_moments_it_ends_in_the_same_bits(unbroken: Path, tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.training.test_resume"])
    choose, out, resumed_from = random.Random(3), tmp_path / "run", []
    seconds = json.loads((unbroken / "summary.json").read_text())["seconds"]
    for _ in range(KILLS):
        ours, theirs = processes.Pipe()
        child = processes.Process(target=run, args=(out, theirs))
        child.start()
        theirs.close()
        try:
            resumed_from.append(ours.recv())
            for _ in range(
                choose.randint(3, 4)
            ):  # steps, however fast the machine is: at least one checkpoint farther
                ours.recv()
        except EOFError:  # it came to its end
            break
        finally:
            time.sleep(choose.uniform(0, seconds / STEPS))
            child.kill()
            child.join()
    train(BASE, PLAN, examples(0, 22), out, held_out=examples(1, 5), resume=True)
    print(f"resumed from steps {resumed_from}")
    assert len(set(resumed_from)) >= 3, "the kills came too early or too late to test anything"
    assert read_adapter(out / "adapter").digest == read_adapter(unbroken / "adapter").digest
    ends = [checkpoints.newest(folder / "checkpoints") for folder in (out, unbroken)]
    for name in ("parameters.safetensors", "reft_model.safetensors", "trainer_state.json"):
        mine, theirs_ = (end / name for end in ends if end)
        assert mine.name == theirs_.name
        if name.endswith("safetensors"):
            assert mine.read_bytes() == theirs_.read_bytes(), name
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [
        json.loads(line)["step"] for line in (unbroken / "metrics.jsonl").read_text().splitlines()
    ]


def test_every_checkpoint_can_be_served(unbroken: Path) -> None:
    found = checkpoints.sealed(unbroken / "checkpoints")
    assert 2 <= len(found) <= 3, "the newest two, and the best"
    for step, path in found.items():
        assert read_adapter(path).manifest.provenance["step"] == step
    summary = json.loads((unbroken / "summary.json").read_text())
    assert read_adapter(unbroken / "adapter").manifest.provenance["step"] == summary["best_step"]
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    best = min((line["eval_loss"], line["step"]) for line in lines if "eval_loss" in line)
    assert best == (summary["best_loss"], summary["best_step"])


def test_a_checkpoint_without_its_seal_does_not_count(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-10"):
        (folder / name).mkdir(parents=True)
        if name != "checkpoint-10":
            (folder / name / "complete").touch()
    assert checkpoints.newest(folder) == folder / "checkpoint-4"
    checkpoints.sweep(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_only_the_same_run_is_resumed(unbroken: Path) -> None:
    with pytest.raises(ClientError, match="holds another run: its plan differ"):
        train(
            BASE,
            replace(PLAN, seed=1),
            examples(0, 22),
            unbroken,
            held_out=examples(1, 5),
            resume=True,
        )
    with pytest.raises(ClientError, match="holds another run: its data and held_out differ"):
        train(BASE, PLAN, examples(2, 22), unbroken, held_out=examples(3, 5), resume=True)
    with pytest.raises(AdapterExists, match="is not empty"):
        train(BASE, PLAN, examples(0, 22), unbroken)


def test_a_run_goes_on_on_another_day(tmp_path: Path) -> None:
    """The chat template writes the date: a run keeps that of its start, and its rows and template are what must be equal."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}. {% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The dog."}]
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"messages": turns}) + "\n")
    first = datetime(2024, 2, 29, 23, 59)
    begun = encode(read_rows(data), tokenizer, max_tokens=99, now=first)
    out, plan = tmp_path / "run", replace(PLAN, epochs=1)
    train(BASE, plan, begun.examples, out, fingerprints=[begun.fingerprint], started=first)
    assert started_at(out) == first
    again = encode(read_rows(data), tokenizer, max_tokens=99, now=started_at(out))
    assert again == begun
    later = encode(read_rows(data), tokenizer, max_tokens=99)
    assert (later.examples != begun.examples, later.fingerprint) == (True, begun.fingerprint)
    train(BASE, plan, later.examples, out, resume=True, fingerprints=[later.fingerprint])
    tokenizer.chat_template += "!"
    other = encode(read_rows(data), tokenizer, max_tokens=99, now=first)
    with pytest.raises(ClientError, match="its data differ"):
        train(BASE, plan, other.examples, out, resume=True, fingerprints=[other.fingerprint])


def test_a_record_without_a_start_has_that_of_its_file(tmp_path: Path) -> None:
    assert started_at(tmp_path) is None
    (tmp_path / "run.json").write_text("{}")
    os.utime(tmp_path / "run.json", (1e9, 1e9))
    assert started_at(tmp_path) == datetime.fromtimestamp(1e9)


@pytest.mark.parametrize("lora", [None, LoraPlan(2, 4.0)])
def test_a_run_that_an_earlier_version_began_goes_on(tmp_path: Path, lora: LoraPlan | None) -> None:
    plan = replace(PLAN, epochs=1, lora=lora)
    train(BASE, plan, examples(0, 6), tmp_path / "run")
    record = tmp_path / "run" / "run.json"
    told = json.loads(record.read_text())
    del told["plan"]["compile"], told["plan"]["adapter"]["activation"]
    if lora is not None:
        del told["plan"]["lora"]["targets"]
    record.write_text(json.dumps(told))
    train(BASE, plan, examples(0, 6), tmp_path / "run", resume=True)
    for other in (replace(plan, compile=True), replace(plan, lora=LoraPlan(4, 4.0))):
        with pytest.raises(ClientError, match="its plan differ"):
            train(BASE, other, examples(0, 6), tmp_path / "run", resume=True)
