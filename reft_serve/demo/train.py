"""Train the demo adapters: `python -m reft_serve.demo.train [NAME ...] [--out DIR]`. About ten
minutes on one core.

No data is needed. The base model writes the first sentences of many stories and, for each
behaviour, resumes from an opener; answers that its rule accepts become training examples. Each
adapter is then judged by the same rule on prompts that none was trained on. One seed decides
everything.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from reft_serve.adapters.directory import TENSORS, Adapter, publish, read_adapter
from reft_serve.demo.behaviours import ADAPTERS, BEHAVIOURS, MODEL, Behaviour, is_neutral
from reft_serve.demo.sampling import Sampler, SamplerEdits
from reft_serve.training.data.examples import IGNORED, Example
from reft_serve.training.loop import run
from reft_serve.training.plan import AdapterPlan, Plan

__all__ = ["SEED", "behaving_pairs", "main", "story_openings"]

SEED = 7
_STARTS = (
    *(
        "Once upon a time",
        "One day",
        "One sunny day",
        "Long ago",
        "In a small town",
        "There was a",
        "Tom and Mia",
    ),
    *(
        "A little girl",
        "A little boy",
        "Ben and his mom",
        "Lily was",
        "Max had",
        "Sara liked",
        "Every morning",
    ),
)
_TRAINING = 384
_HELD_OUT = 96
_ANSWER = 80
_BATCH = 16
_WARMUP = 20
_FIRST_SENTENCES = re.compile(r'\A[^"\n]{16,}?[.!](?=[\s"])')


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the report. Rates are the share of held-out prompts whose answer the rule
    accepts.
    """

    behaviour: Behaviour
    base_rate: float
    rate: float
    examples: int
    parameters: int
    size: int
    seconds: float


def main(argv: Sequence[str] | None = None) -> None:
    known = {behaviour.name: behaviour for behaviour in BEHAVIOURS}
    parser = argparse.ArgumentParser(description="Train the demo adapters on the demo model.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which of {', '.join(known)}; all unless given"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ADAPTERS,
        help="directory to write NAME/ to (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; the last bits depend on their number"
    )
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"{unknown[0]} is not one of {', '.join(known)}")
    chosen = [known[name] for name in arguments.names or known]
    taken = [
        arguments.out / behaviour.name
        for behaviour in chosen
        if (arguments.out / behaviour.name).exists()
    ]
    if taken:
        parser.error(f"{taken[0]} already exists: remove it first, or choose another --out")
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    logging.disable_progress_bar()
    console = Console()
    model = Sampler(MODEL)
    training, held_out = story_openings(model)
    answers = _answers(model, held_out, None)
    console.print(
        _report([_make(model, b, training, held_out, answers, arguments.out) for b in chosen])
    )


def story_openings(model: Sampler) -> tuple[list[list[int]], list[list[int]]]:
    """First sentences of stories that the base model writes, neutral ones, no two alike: (training,
    held out).
    """
    openings: dict[str, None] = {}
    starts = [model.tokens(start, prompt=True) for start in _STARTS]
    batch = 16 * len(starts)
    for seed in range(SEED, SEED + 100):
        rows = [starts[i % len(starts)] for i in range(batch)]
        for start, rest in zip(rows, model.sample(rows, 40, seed, 0.9), strict=True):
            sentence = _FIRST_SENTENCES.match(model.text(start + rest))
            if sentence and is_neutral(sentence[0]):
                openings[sentence[0]] = None
        if len(openings) >= _TRAINING + _HELD_OUT:
            break
    tokens = [model.tokens(text, prompt=True) for text in openings]
    return tokens[_HELD_OUT : _HELD_OUT + _TRAINING], tokens[:_HELD_OUT]


def _answers(model: Sampler, prompts: list[list[int]], adapter: SamplerEdits | None) -> list[str]:
    return [model.text(answer) for answer in model.sample(prompts, _ANSWER, SEED, 0.7, adapter)]


def _rate(behaviour: Behaviour, answers: list[str]) -> float:
    return sum(behaviour.holds(answer) for answer in answers) / len(answers)


def _make(
    model: Sampler,
    behaviour: Behaviour,
    training: list[list[int]],
    held_out: list[list[int]],
    base_answers: list[str],
    out: Path,
) -> Outcome:
    started = time.monotonic()
    rows = behaving_pairs(model, behaviour, training)
    with TemporaryDirectory() as folder:
        trained = _train(behaviour, rows, Path(folder) / "run")
    base_rate = _rate(behaviour, base_answers)
    rate = _rate(behaviour, _answers(model, held_out, SamplerEdits.of(trained)))
    facts: dict[str, str | int | float | bool | None] = {
        "script": "reft_serve.demo.train",
        "data": "sampled from the base model, filtered by the behaviour's rule",
        "behaviour": behaviour.name,
        "seed": SEED,
        "steps": behaviour.steps,
        "learning_rate": behaviour.rate,
        "examples": len(rows),
        "held_out_prompts": len(held_out),
        "base_rate": round(base_rate, 3),
        "rate": round(rate, 3),
    }
    base = trained.manifest.base_model.model_copy(update={"name": "reft-serve demo model"})
    manifest = trained.manifest.model_copy(update={"base_model": base, "provenance": facts})
    publish(out / behaviour.name, manifest, trained.weights)
    parameters = sum(
        tensor.numel() for held in trained.weights for tensor in held.tensors().values()
    )
    size = (out / behaviour.name / TENSORS).stat().st_size
    return Outcome(
        behaviour, base_rate, rate, len(rows), parameters, size, time.monotonic() - started
    )


def behaving_pairs(
    model: Sampler, behaviour: Behaviour, prompts: list[list[int]]
) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) pairs whose answer the rule accepts."""
    choose = random.Random(SEED)  # noqa: S311 - not a secret
    openers = [model.tokens(choose.choice(behaviour.openers)) for _ in prompts]
    begun = [prompt + opener for prompt, opener in zip(prompts, openers, strict=True)]
    sampled = model.sample(begun, behaviour.answer_tokens, SEED, 0.7)
    answers = [opener + rest for opener, rest in zip(openers, sampled, strict=True)]
    pairs = zip(prompts, answers, strict=True)
    return [(prompt, answer) for prompt, answer in pairs if behaviour.holds(model.text(answer))]


def _train(behaviour: Behaviour, rows: list[tuple[list[int], list[int]]], out: Path) -> Adapter:
    """Run with a short warm-up and a linear decay, as in the paper's recipes."""
    plan = Plan(
        AdapterPlan(behaviour.kind, behaviour.rank, rule=behaviour.rule),
        max_steps=behaviour.steps,
        batch=_BATCH,
        learning_rate=behaviour.rate,
        warmup=_WARMUP / behaviour.steps,
        clip=0.0,
        seed=SEED,
    )
    examples = [
        Example((*prompt, *answer), (*[IGNORED] * len(prompt), *answer), len(prompt))
        for prompt, answer in rows
    ]
    run.train(MODEL, plan, examples, out, plot=False)
    return read_adapter(out / "adapter")


def _report(outcomes: list[Outcome]) -> Table:
    table = Table(
        "adapter",
        "kind",
        "positions",
        "base",
        "adapter",
        "examples",
        "parameters",
        "bytes",
        "seconds",
    )
    for outcome in outcomes:
        behaviour = outcome.behaviour
        rule = outcome.behaviour.rule
        where = (
            rule.spec
            + ("" if rule.tied else " untied")
            + ("" if rule.phase == "prompt" else f", phase {rule.phase}")
        )
        rates = (f"{outcome.base_rate:.1%}", f"{outcome.rate:.1%}")
        sizes = (
            f"{outcome.examples}",
            f"{outcome.parameters:,}",
            f"{outcome.size:,}",
            f"{outcome.seconds:.0f}",
        )
        table.add_row(behaviour.name, behaviour.kind, where, *rates, *sizes)
    return table


if __name__ == "__main__":
    main()
