"""The time of each step of a training run."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from reft_serve.training.data.examples import IGNORED, Example
from reft_serve.training.loop.objectives import Supervised
from reft_serve.training.loop.trainer import ReftTrainer, arguments

# Token ids of an example, and how many of them are its prompt.
Rows = list[tuple[list[int], int]]


def timed_steps(model: Any, plan: Any, rows: Rows, *, packed: bool) -> list[tuple[float, float]]:
    """Train on `rows`; when each step ended, by the clock and by the processor's time."""
    ends: list[tuple[float, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append((time.perf_counter(), time.process_time()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append((time.perf_counter(), time.process_time()))

    examples = [Example(tuple(ids), (IGNORED,) * n + tuple(ids[n:]), n) for ids, n in rows]
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(plan, Path(folder), evaluates=False)
        settings.save_strategy = "no"
        trainer: ReftTrainer[Example] = ReftTrainer(
            model, plan, settings, Supervised(), examples, [], lambda path: None, packed=packed
        )
        trainer.add_callback(Clock())
        trainer.train()
    return ends
