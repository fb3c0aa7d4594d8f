"""Progress of a run, from the measurements of its process to the job's row, events and metrics."""

from __future__ import annotations

import time

from reft_serve.database.jobs.claimed import Progress
from reft_serve.observability import TRAINED_TOKENS
from reft_serve.training.jobs.lease import Lease
from reft_serve.training.jobs.messages import Measured, Started
from reft_serve.training.jobs.publishing import openai_metrics
from reft_serve.training.jobs.uploads import Uploads

__all__ = ["RunProgress"]

_MOST_METRICS = 200


class RunProgress:
    """Passes each measurement to the job's lease, which writes it with the next heartbeat, and to
    the uploads of checkpoints.
    """

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._begun = 0.0
        self._first_step = 0
        self._tokens = 0

    def begin(self, message: Started) -> None:
        """The process has begun, or resumed, its run."""
        self._begun = time.monotonic()
        self._first_step = message.step
        self._lease.progress = Progress(message.step, message.steps, self._tokens)

    def measure(self, message: Measured, uploads: Uploads) -> None:
        """Report a step. Call `begin` before."""
        self._lease.wake()
        before = self._lease.progress
        assert before is not None
        self._count(int(message.metrics.get("tokens", 0)))
        finish = self._estimated_finish_ms(message.step, before.steps)
        self._lease.progress = Progress(message.step, before.steps, self._tokens, finish)

        event = openai_metrics([{"step": message.step, **message.metrics}])[message.step]
        uploads.note(message.step, event)
        every = -(-before.steps // _MOST_METRICS)
        if "valid_loss" in event or message.step % every == 0:
            self._lease.queue_event(_sentence(message.step, before.steps, event), "info", event)

    def _count(self, tokens: int) -> None:
        TRAINED_TOKENS.inc(max(0, tokens - self._tokens) if self._tokens else 0)
        self._tokens = tokens or self._tokens

    def _estimated_finish_ms(self, step: int, steps: int) -> int | None:
        done = step - self._first_step
        if done <= 0:
            return None
        left = (time.monotonic() - self._begun) / done * (steps - step)
        return int((time.time() + left) * 1000)


def _sentence(step: int, steps: int, metrics: dict[str, float]) -> str:
    parts = [f"training loss={metrics['train_loss']:.4f}"] if "train_loss" in metrics else []
    if "valid_loss" in metrics:
        parts.append(f"validation loss={metrics['valid_loss']:.4f}")
    return f"Step {step}/{steps}: {', '.join(parts)}"
