"""A run held to its tenant's limits: its size before it starts, and its time while it runs. No
torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from reft_serve.errors import JobLimitExceeded
from reft_serve.training.jobs.messages import Bounds
from reft_serve.training.loop.report import read_metrics

__all__ = ["Clock", "check_size", "hours_sentence"]


def check_size(bounds: Bounds, lengths: Sequence[int], epochs: int) -> None:
    """Check the bounds of a run over examples with these token counts.

    Raises:
        JobLimitExceeded: it has more examples or tokens.
    """
    for name, count, most in (
        ("examples", len(lengths) * epochs, bounds.examples),
        ("tokens", sum(lengths) * epochs, bounds.tokens),
    ):
        if most is not None and count > most:
            raise JobLimitExceeded(
                f"the job has {count:,} {name} in {epochs} epochs, and the limit job_{name} is "
                f"{most:,}: give fewer examples or a smaller n_epochs"
            )


def hours_sentence(hours: float) -> str:
    """Error of a job that reached its limit of training time."""
    return (
        f"the job has trained for {hours:g} hours, which is the limit job_hours: give fewer "
        "examples or a smaller n_epochs"
    )


class Clock:
    """The seconds that a job has trained: those of earlier attempts, by their metrics, and those
    since now.
    """

    def __init__(self, metrics: Path) -> None:
        self._before = 0.0
        last = 0.0
        for line in read_metrics(metrics):
            seconds = float(line.get("seconds", 0.0))
            if seconds < last:  # the next attempt, whose clock began again
                self._before += last
            last = seconds
        self._before += last
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._begun
