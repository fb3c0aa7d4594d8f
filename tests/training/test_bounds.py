"""A run's size and time against its tenant's limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reft_serve.errors import JobLimitExceeded
from reft_serve.training.jobs.bounds import Clock, check_size
from reft_serve.training.jobs.messages import Bounds


def test_examples_and_tokens_are_counted_for_every_epoch() -> None:
    check_size(Bounds(), [10**9] * 3, 100)
    check_size(Bounds(examples=6, tokens=60), [10, 10, 10], 2)
    with pytest.raises(
        JobLimitExceeded, match="6 examples in 2 epochs, and the limit job_examples is 5"
    ):
        check_size(Bounds(examples=5), [10, 10, 10], 2)
    with pytest.raises(
        JobLimitExceeded, match="60 tokens in 2 epochs, and the limit job_tokens is 59"
    ):
        check_size(Bounds(tokens=59), [10, 10, 10], 2)


def test_the_time_of_earlier_attempts_counts(tmp_path: Path) -> None:
    lines = [
        {"step": k, "seconds": seconds} for k, seconds in enumerate([1.0, 5.0, 5.0, 2.0, 3.0, 0.5])
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert 8.5 <= Clock(tmp_path / "metrics.jsonl").seconds < 20
    assert Clock(tmp_path / "none").seconds < 10
