"""What LoReFT, DiReFT and LoRA learn on the shipped model, against how many parameters they train.

The model itself writes the data: stories that go on from an opener and show a behaviour, those that the behaviour's rule
accepts (`reft_serve.demo.train`). An arm is trained on each behaviour in turn by the same loop; its score is the share of
held-out prompts whose sampled answer shows the behaviour, its loss the mean per token of held-out answers that do.

  scripts/bench methods                                    about ten minutes on two cores
  scripts/bench methods --add                              what is missing of it, where it was broken off
  scripts/bench methods --train TRAIN.jsonl --test TEST.jsonl   the same arms on rows of the commonsense recipe, scored by
                                                           its exact match; the result is printed, not kept
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from benchmarks._report import RESULTS, save
from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.directory import TENSORS
from reft_serve.datafiles.formats import read_rows
from reft_serve.demo.behaviours import BEHAVIOURS, MODEL, Behaviour
from reft_serve.demo.sampling import Sampler, SamplerEdits
from reft_serve.demo.train import SEED, behaving_pairs, story_openings
from reft_serve.evaluation.predictions import questions
from reft_serve.evaluation.scoring import judge, wilson
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import Kind
from reft_serve.recipes.recipe import load_recipe
from reft_serve.training.data.batching import collate
from reft_serve.training.data.encoding import encode
from reft_serve.training.data.examples import IGNORED, Example
from reft_serve.training.loop.objectives import Supervised
from reft_serve.training.loop.trainer import ReftTrainer, arguments
from reft_serve.training.model.adapter import build, publish_version
from reft_serve.training.model.edited_model import EditedModel
from reft_serve.training.model.lora import wrap
from reft_serve.training.plan import AdapterPlan, LoraPlan, Plan

# The paper's DiReFT has no orthogonality: pyreft's NodireftIntervention.
KINDS: dict[str, Kind] = {"LoReFT": "loreft", "DiReFT": "nodireft"}
RATES = {"LoReFT": 5e-3, "DiReFT": 5e-3, "LoRA": 5e-3}
LORA_TARGETS = ("q_proj", "v_proj")
ANSWER_TOKENS = 80


@dataclass(frozen=True, slots=True)
class Arm:
    """A method at a rank; `rank` 0 is the base model."""

    method: str
    rank: int

    def plan(self, rule: PositionRule, args: argparse.Namespace) -> Plan:
        """Its run: alike but for what is trained, and how fast it may learn."""
        return Plan(
            adapter=AdapterPlan(kind=KINDS.get(self.method, "loreft"), rank=max(self.rank, 1), rule=rule),
            lora=LoraPlan(self.rank, 2.0 * self.rank, targets=LORA_TARGETS) if self.method == "LoRA" else None,
            max_steps=args.steps, batch=args.batch, learning_rate=RATES.get(self.method, 1.0), warmup=0.1, seed=SEED,
            save_every=args.steps, keep=1,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lesson:
    """Something to learn: examples, held-out examples, and a judge of answers to held-out prompts."""

    name: str
    training: Sequence[Example]
    held_out: Sequence[Example]
    judge: Callable[[Callable[[Sequence[list[int]]], list[str]]], list[bool]]


@dataclass(frozen=True, slots=True)
class Result:
    """One arm on one lesson. `size` in bytes on disk, `seconds` of processor time to train, `loss` per held-out token."""

    method: str
    rank: int
    lesson: str
    parameters: int
    size: int
    seconds: float
    loss: float
    right: int
    asked: int


def main() -> None:
    """Train every arm on every lesson; print the table, write JSON and a plot."""
    args = _arguments()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    console = Console()
    storyteller = Sampler(MODEL)
    lessons = (
        [_file_lesson(args.train, args.test)]
        if args.train
        else _behaviour_lessons(storyteller, args.behaviours)
    )
    for lesson in lessons:
        console.print(
            f"{lesson.name}: {len(lesson.training)} examples, {len(lesson.held_out)} held out"
        )
    ranks = [int(rank) for rank in args.ranks.split(",")]
    arms = [Arm("base", 0), *(Arm(method, rank) for method in (*KINDS, "LoRA") for rank in ranks)]
    runs = [(arm, lesson) for arm in arms for lesson in lessons]
    kept = {name: value for name, value in vars(args).items() if name not in ("add", "threads")}
    base = sum(p.numel() for p in storyteller.lm.parameters())
    settings = {
        "arguments": kept,
        "rates": RATES,
        "lora_targets": list(LORA_TARGETS),
        "base_parameters": base,
    }
    results = _known(settings, RESULTS / "methods.json") if args.add else []
    done = {(result.method, result.rank, result.lesson) for result in results}
    summary: list[dict[str, Any]] = []
    for arm, lesson in track(runs, "training", console=console):
        if (arm.method, arm.rank, lesson.name) not in done:
            results.append(_run(arm, lesson, storyteller, args))
            console.print(results[-1])
        summary = _summary(arms, results, len(lessons))
        if not args.train and summary:
            save(
                "methods",
                settings | {"rows": summary, "runs": [asdict(result) for result in results]},
                _plot,
            )
    console.print(_table(summary))


def _known(settings: dict[str, Any], path: Path) -> list[Result]:
    """The runs that a result of the same settings has."""
    known = json.loads(path.read_text()) if path.exists() else {"runs": []} | settings
    if any(known[name] != value for name, value in settings.items()):
        raise SystemExit(f"{path} was measured with other settings: begin anew, without --add")
    return [Result(**run) for run in known["runs"]]


def _summary(arms: Sequence[Arm], results: Sequence[Result], lessons: int) -> list[dict[str, Any]]:
    """A row for each arm that has been through all lessons."""
    by_arm = [
        (arm, [r for r in results if (r.method, r.rank) == (arm.method, arm.rank)]) for arm in arms
    ]
    return [_mean(arm, its) for arm, its in by_arm if len(its) == lessons]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--behaviours", default="cats,rain", help="of " + ", ".join(b.name for b in BEHAVIOURS)
    )
    parser.add_argument("--ranks", default="1,4,16")
    parser.add_argument("--positions", default="f7+l7", help="one rule for both kinds of ReFT")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--train", type=Path, help="rows of the commonsense recipe, instead of behaviours"
    )
    parser.add_argument("--test", type=Path)
    parser.add_argument(
        "--add", action="store_true", help="keep the runs that the result has, and do the others"
    )
    args = parser.parse_args()
    if bool(args.train) != bool(args.test):
        parser.error("--train and --test go together")
    return args


def _behaviour_lessons(storyteller: Sampler, names: str) -> list[Lesson]:
    known = {behaviour.name: behaviour for behaviour in BEHAVIOURS}
    training, held_out = story_openings(storyteller)
    return [
        _behaviour_lesson(storyteller, known[name], training, held_out) for name in names.split(",")
    ]


def _behaviour_lesson(
    storyteller: Sampler,
    behaviour: Behaviour,
    training: list[list[int]],
    held_out: list[list[int]],
) -> Lesson:
    def examples(prompts: list[list[int]]) -> list[Example]:
        return [
            _example(prompt, answer)
            for prompt, answer in behaving_pairs(storyteller, behaviour, prompts)
        ]

    def shows(answers_to: Callable[[Sequence[list[int]]], list[str]]) -> list[bool]:
        return [behaviour.holds(answer) for answer in answers_to(held_out)]

    return Lesson(behaviour.name, examples(training), examples(held_out), shows)


def _example(prompt: list[int], answer: list[int]) -> Example:
    """An answer cut off in the middle of a story, so without an end."""
    return Example((*prompt, *answer), (IGNORED,) * len(prompt) + tuple(answer), len(prompt))


def _file_lesson(train: Path, test: Path) -> Lesson:
    task = load_recipe("commonsense").task
    assert task is not None
    tokenizer, held_rows = AutoTokenizer.from_pretrained(MODEL), read_rows(test)
    training = encode(read_rows(train), tokenizer, max_tokens=512, task=task)
    held_out = encode(held_rows, tokenizer, max_tokens=512, task=task)
    for note in (*training.notes(), *held_out.notes()):
        print(note)
    asked = questions(held_rows, task)
    prompts = [list(tokenizer(question.prompt).input_ids) for question in asked]

    def matches(answers_to: Callable[[Sequence[list[int]]], list[str]]) -> list[bool]:
        answers = answers_to(prompts)
        return [
            bool(judge(task, a, question.reference).correct)
            for a, question in zip(answers, asked, strict=True)
        ]

    return Lesson(train.stem, training.examples, held_out.examples, matches)


def _run(arm: Arm, lesson: Lesson, storyteller: Sampler, args: argparse.Namespace) -> Result:
    rule = PositionRule(args.positions)
    plan = arm.plan(rule, args)
    temperature, new_tokens = (1e-5, 16) if args.train else (0.7, ANSWER_TOKENS)

    def answers(adapter: SamplerEdits | None, prompts: Sequence[list[int]]) -> list[str]:
        sampled = storyteller.sample(prompts, new_tokens, SEED, temperature, adapter)
        return [storyteller.text(answer) for answer in sampled]

    with tempfile.TemporaryDirectory() as folder:
        model = _model(plan, arm)
        seconds = _fit(model, plan, lesson, Path(folder)) if arm.rank else 0.0
        loss = _loss(model, lesson.held_out, rule)
        parameters = (
            sum(p.numel() for p in model.parameters() if p.requires_grad) if arm.rank else 0
        )
        size, adapter, lora = 0, None, None
        path = Path(folder) / "adapter"
        if arm.method == "LoRA":
            model.lm.save_pretrained(path)
            size = (path / "adapter_model.safetensors").stat().st_size
            lora = PeftModel.from_pretrained(
                storyteller.lm, path
            )  # wraps the storyteller's own modules
        elif arm.rank:
            publish_version(path, model, plan, read_base_model(MODEL), {})
            size = (path / TENSORS).stat().st_size
            adapter = SamplerEdits(tuple(model.edits), rule)
        verdicts = lesson.judge(partial(answers, adapter))
        if lora is not None:
            lora.unload()
    return Result(
        arm.method,
        arm.rank,
        lesson.name,
        parameters,
        size,
        seconds,
        loss,
        sum(verdicts),
        len(verdicts),
    )


def _model(plan: Plan, arm: Arm) -> EditedModel:
    if arm.method in KINDS:
        return build(MODEL, plan)
    lm: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    set_seed(plan.seed)
    return EditedModel(lm if plan.lora is None else wrap(lm, plan.lora), [])


def _fit(model: EditedModel, plan: Plan, lesson: Lesson, folder: Path) -> float:
    objective, settings = Supervised(), arguments(plan, folder / "checkpoints", evaluates=False)
    packed = model.can_pack(max(objective.tokens(example) for example in lesson.training))
    trainer: ReftTrainer[Example] = ReftTrainer(
        model,
        plan,
        settings,
        objective,
        lesson.training,
        (),
        lambda path: path.mkdir(parents=True),
        packed=packed,
        watchers=(),
    )
    started = time.process_time()
    trainer.train()
    return time.process_time() - started


def _loss(model: EditedModel, examples: Sequence[Example], rule: PositionRule) -> float:
    model.eval()
    total = tokens = 0.0
    for start in range(0, len(examples), 16):
        logprobs_Y = model.score(collate(examples[start : start + 16], rule, packed=False))[0]
        total, tokens = total - float(logprobs_Y.sum()), tokens + len(logprobs_Y)
    return total / tokens


def _mean(arm: Arm, results: Sequence[Result]) -> dict[str, Any]:
    """An arm over its lessons: sizes are those of one adapter, scores are pooled."""
    right, asked = sum(r.right for r in results), sum(r.asked for r in results)
    low, high = wilson(right, asked)
    return {
        "method": arm.method, "rank": arm.rank, "parameters": results[0].parameters, "size": results[0].size,
        "seconds": sum(r.seconds for r in results) / len(results), "loss": sum(r.loss for r in results) / len(results),
        "score": right / asked, "low": low, "high": high, "asked": asked,
    }  # fmt: skip


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table()
    for column in (
        "method",
        "rank",
        "parameters",
        "bytes",
        "processor s",
        "held-out loss",
        "score",
        "95 % interval",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        sizes = (
            f"{row['rank']}",
            f"{row['parameters']:,}",
            f"{row['size']:,}",
            f"{row['seconds']:.0f}",
        )
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        table.add_row(row["method"], *sizes, f"{row['loss']:.3f}", f"{row['score']:.1%}", interval)
    return table


def _plot(result: dict[str, Any], axes: Any) -> None:
    rows = result["rows"]
    axes.axhline(100 * rows[0]["score"], color="0.6", linewidth=0.8, label="base", zorder=0)
    for method in dict.fromkeys(row["method"] for row in rows[1:]):
        points = [row for row in rows if row["method"] == method]
        at, scores = [row["parameters"] for row in points], [100 * row["score"] for row in points]
        errors = [[100 * abs(row["score"] - row[end]) for row in points] for end in ("low", "high")]
        axes.errorbar(at, scores, errors, marker="o", capsize=3, linewidth=1, label=method)
        for row in points:
            axes.annotate(
                f"{row['rank']}",
                (row["parameters"], 100 * row["score"]),
                xytext=(5, -12),
                textcoords="offset points",
            )
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters (numbers at points: rank)")
    axes.set_ylabel("held-out answers that behave, %")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, loc="lower right")


if __name__ == "__main__":
    main()
