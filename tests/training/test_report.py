"""What a person sees of a run."""

from __future__ import annotations

import io
import re
import time

from rich.console import Console

from reft_serve.training.loop.report import Bar


def _rates(bar: Bar) -> list[float]:
    fields = bar._progress.tasks[0].fields["numbers"]
    return [float(found.replace(",", "")) for found in re.findall(r"([\d,]+) tokens/s", fields)]


def test_a_resumed_run_counts_only_the_tokens_since_then() -> None:
    bar = Bar(Console(file=io.StringIO()))
    bar.started(100, 200)
    try:
        bar.logged(101, {"loss": 1.0, "tokens": 1_000_500})
        assert _rates(bar) == []
        time.sleep(0.05)
        bar.logged(102, {"loss": 1.0, "tokens": 1_000_600})
        assert 0 < _rates(bar)[0] <= 2000
    finally:
        bar.stop()


def test_a_new_run_counts_from_its_start() -> None:
    bar = Bar(Console(file=io.StringIO()))
    bar.started(0, 200)
    try:
        time.sleep(0.05)
        bar.logged(1, {"loss": 1.0, "tokens": 100})
        assert 0 < _rates(bar)[0] <= 2000
    finally:
        bar.stop()
