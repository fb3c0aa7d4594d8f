"""Examples per second of training, ours against pyreft's, and what each spends its time on.

Two processes, each with its own libraries, take turns: the same examples, as many per optimiser step, the same dtype and
the paper's positions (LoReFT of rank 8 at all layers, f7+l7). Each side runs its own Trainer; a figure is the median of
the ratios of neighbouring turns. Peak memory is the process's largest resident set during a turn.

Data sets: files of examples (`--data FILE --recipe NAME`), or lengths drawn as a long-tailed set has them where none is
given; and at fixed lengths, where no example is padded and nothing is gained by packing.

  scripts/bench train --pyreft ENV/bin/python [--data commonsense=FILE ...]   about twenty minutes on two cores
  scripts/bench train ... --models 100m --add                                 one part of it, put to the result so far
  scripts/bench train ... --layers 3 --epochs 4 --add                         few layers, and the data several times

`tests/training/fixtures/record_pyreft.py` says how to make pyreft's environment.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._report import RESULTS, save
from benchmarks._train_sides import ask, side
from reft_serve.demo.behaviours import MODEL
from tests.support.training.steps import Rows

_RANK, _POSITIONS = 8, "f7+l7"


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table: a base model, a data set, and how much of it a turn takes."""

    model: str
    data: str
    rows: Rows
    batch: int
    accumulate: int
    steps: int
    epochs: int


def main() -> None:
    """Run the benchmark, print a table, write JSON and a plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pyreft", metavar="PYTHON", help="interpreter of an environment with pyreft 0.1.0"
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a data file; may be repeated",
    )
    parser.add_argument("--models", default="shipped,100m")
    parser.add_argument("--lengths", default="64,256", help="fixed lengths to try")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--layers", default="", metavar="N,N", help="edit these layers, not all")
    parser.add_argument("--epochs", type=int, default=1, help="times through a turn's examples")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--compile", action="store_true", help="our side as with `reft-serve train --compile`"
    )
    parser.add_argument("--out", default="train", help="name of the result")
    parser.add_argument(
        "--note", default="", help="kept with the rows, such as what else ran on the machine"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the other rows that the result has"
    )
    args = parser.parse_args()
    if not args.pyreft:
        parser.error("--pyreft PYTHON is needed")
    settings = {
        "dtype": args.dtype,
        "threads": args.threads,
        "rank": _RANK,
        "positions": _POSITIONS,
    }
    cases = _known(settings, RESULTS / f"{args.out}.json") if args.add else {}
    with tempfile.TemporaryDirectory() as folder:
        for case in _cases(args, Path(folder)):
            cases[case["model"], case["data"]] = case
            Console().print(case["model"], case["data"], f"{case['ratio']:.2f}x", highlight=False)
            # After each, so that a run that is broken off leaves what it measured.
            save(args.out, settings | {"cases": list(cases.values())}, _plot)
    _print(list(cases.values()))


def _known(settings: dict[str, Any], path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows, by model and data, of a result that has the same settings."""
    known = json.loads(path.read_text()) if path.exists() else settings | {"cases": []}
    if any(known[name] != value for name, value in settings.items()):
        raise SystemExit(f"{path} was measured with other settings: choose another --out")
    return {(case["model"], case["data"]): case for case in known["cases"]}


def _cases(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Every row of the table, as it is measured."""
    # Fixed lengths first: a process keeps some of the memory that longer examples took.
    sets = {
        f"all {length}": _fixed(int(length), 400) for length in args.lengths.split(",") if length
    }
    files = {
        name: _read(Path(file), name) for name, file in (text.split("=", 1) for text in args.data)
    }
    sets |= files or {"long-tailed": _long_tailed(400)}
    for model in args.models.split(","):
        path = MODEL if model == "shipped" else _random_model(folder / model)
        batch, accumulate, steps = (16, 2, 3) if model == "shipped" else (16, 1, 1)
        setup = {
            "base": str(path.resolve()), "dtype": args.dtype, "threads": args.threads, "rank": _RANK,
            "positions": _POSITIONS, "batch": batch, "accumulate": accumulate, "compile": args.compile,
            "layers": [int(layer) for layer in args.layers.split(",") if layer] or None, "epochs": args.epochs,
        }  # fmt: skip
        ours = [sys.executable, "-m", "benchmarks._train_ours"]
        theirs = [args.pyreft, str(Path(__file__).parent / "_train_pyreft.py")]
        with side(ours, setup) as us, side(theirs, setup) as them:
            for name, rows in sets.items():
                label = f"{model}, compiled" if args.compile else model
                label += f", layers {args.layers}" if args.layers else ""
                label += f", {args.epochs} epochs" if args.epochs > 1 else ""
                case = Case(label, name, rows, batch, accumulate, steps, args.epochs)
                measured = _compare(case, us, them, args.rounds)
                profiles = {"ours": _profile(us, rows), "pyreft": _profile(them, rows)}
                yield measured | {"profile": profiles, "note": args.note}


def _compare(
    case: Case, us: subprocess.Popen[str], them: subprocess.Popen[str], rounds: int
) -> dict[str, Any]:
    choose, different = random.Random(1), case.batch * case.accumulate * case.steps
    per_turn, turns = different * case.epochs, []
    for turn in range(rounds + 1):
        job = {"examples": choose.sample(case.rows, different)}
        # The side that begins changes, so that neither has the other's warm caches or a drifting clock to thank.
        sides = (us, them) if turn % 2 else (them, us)
        answers = {id(side): ask(side, job) for side in sides}
        turns.append((answers[id(us)], answers[id(them)]))
    warm = turns[1:]
    ratios, cpu_ratios = (
        [sum(theirs[key]) / sum(ours[key]) for ours, theirs in warm]
        for key in ("seconds", "cpu_seconds")
    )
    lengths = sorted(len(ids) for ids, _ in case.rows)
    rate = {
        name: statistics.median(per_turn / sum(turn[side]["seconds"]) for turn in warm)
        for side, name in enumerate(("ours", "pyreft"))
    }
    peaks = {
        name: max(turn[side]["peak_mib"] for turn in turns)
        for side, name in enumerate(("ours", "pyreft"))
    }
    return {
        "model": case.model, "data": case.data, "examples_per_step": case.batch * case.accumulate,
        "lengths": {"median": lengths[len(lengths) // 2], "p95": lengths[len(lengths) * 95 // 100], "max": lengths[-1]},
        "examples_per_second": rate, "ratio": statistics.median(ratios), "ratios": ratios,
        "cpu_ratio": statistics.median(cpu_ratios), "peak_mib": peaks,
    }  # fmt: skip


def _profile(side: subprocess.Popen[str], rows: Rows) -> list[Any]:
    """Milliseconds of one step of four examples, by operation: the largest."""
    profile: list[Any] = ask(side, {"examples": rows[:4], "profile": True})["profile"]
    return profile


def _read(file: Path, name: str) -> Rows:
    """The examples of a data file, as the trainer reads them, with the shipped model's tokenizer."""
    from transformers import AutoTokenizer

    from reft_serve.datafiles.formats import read_rows
    from reft_serve.recipes.recipe import load_recipe, recipe_names
    from reft_serve.training.data.encoding import encode

    task = load_recipe(name).task if name in recipe_names() else None
    data = encode(read_rows(file), AutoTokenizer.from_pretrained(MODEL), max_tokens=512, task=task)
    rows = [(list(example.input_ids), example.prompt_len) for example in data.examples]
    random.Random(0).shuffle(rows)
    return rows[:1000]


def _long_tailed(count: int) -> Rows:
    choose = random.Random(0)
    lengths = [min(480, max(24, int(choose.lognormvariate(4.8, 0.6)))) for _ in range(count)]
    return [([choose.randint(3, 2000) for _ in range(n)], n - 8) for n in lengths]


def _fixed(length: int, count: int) -> Rows:
    choose = random.Random(0)
    return [([choose.randint(3, 2000) for _ in range(length)], length - 8) for _ in range(count)]


def _random_model(path: Path) -> Path:
    """A 110 M-parameter Llama with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.support.shapes import Shape

    config = LlamaConfig.from_pretrained(Shape(dtype="float32").write(path))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def _print(cases: list[dict[str, Any]]) -> None:
    table = Table(
        "model",
        "data",
        "tokens: median, p95, max",
        "ours ex/s",
        "pyreft ex/s",
        "ratio",
        "peak MiB: ours, pyreft",
    )
    for case in cases:
        lengths, rate, peak = case["lengths"], case["examples_per_second"], case["peak_mib"]
        table.add_row(
            case["model"], case["data"], f"{lengths['median']}, {lengths['p95']}, {lengths['max']}",
            f"{rate['ours']:.2f}", f"{rate['pyreft']:.2f}", f"{case['ratio']:.2f}x",
            f"{peak['ours']:.0f}, {peak['pyreft']:.0f}",
        )  # fmt: skip
    Console().print(table)


def _plot(result: dict[str, Any], axes: Any) -> None:
    labels = [f"{case['model']}\n{case['data']}" for case in result["cases"]]
    axes.bar(range(len(labels)), [case["ratio"] for case in result["cases"]], color="#4c72b0")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylabel("examples per second, ours / pyreft")


if __name__ == "__main__":
    main()
