"""Short runs: a base model, a plan's adapter, examples, and what a run writes."""

from __future__ import annotations

import json
import random
from pathlib import Path

from reft_serve.interventions.positions import PositionRule
from reft_serve.training.data.examples import IGNORED, Example, Preference
from reft_serve.training.plan import AdapterPlan
from tests.support.paths import GOLDEN

BASE = GOLDEN / "models" / "tiny-llama"
SHAPE = AdapterPlan("loreft", 4, None, PositionRule("f3+l3"))


def tokens(choose: random.Random, count: int) -> tuple[int, ...]:
    return tuple(choose.randint(3, 299) for _ in range(count))


def examples(count: int) -> list[Example]:
    choose = random.Random(5)
    found = []
    for _ in range(count):
        prompt, answer = tokens(choose, choose.randint(2, 24)), tokens(choose, choose.randint(1, 9))
        found.append(Example(prompt + answer, (IGNORED,) * len(prompt) + answer, len(prompt)))
    return found


def pairs(count: int) -> list[Preference]:
    choose = random.Random(6)
    return [Preference(tokens(choose, 8), (11, 12, 13), (21, 22)) for _ in range(count)]


def metrics(out: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


class StopsAt:
    """A watcher that stops the run after a step."""

    def __init__(self, last: int) -> None:
        self.last, self.step, self.paths = last, 0, list[Path]()

    def started(self, step: int, steps: int) -> None: ...

    def logged(self, step: int, metrics: dict[str, float]) -> None: ...

    def saved(self, step: int, path: Path) -> None:
        self.paths.append(path)

    def wants_stop(self) -> bool:
        self.step += 1
        return self.step == self.last
