"""Reports of a run: a progress bar, `metrics.jsonl`, a plot of the losses."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Bar", "Record", "plot_losses"]

METRICS = "metrics.jsonl"
PLOT = "loss.png"


class Record:
    """Keeps `metrics.jsonl`: one object per step and per evaluation, each with `step` and `seconds`
    since the start.

    A resumed run continues after the step that it resumes from; later lines, of steps that are done
    again, are dropped.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / METRICS
        self._started = time.monotonic()

    def started(self, step: int, steps: int) -> None:
        """Drop what is done again."""
        kept = [line for line in read_metrics(self._path) if int(line["step"]) <= step]
        aside = self._path.with_suffix(".new")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(aside, self._path)

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        seconds = round(time.monotonic() - self._started, 3)
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "seconds": seconds, **metrics}) + "\n")

    def saved(self, step: int, path: Path) -> None:
        pass

    def wants_stop(self) -> bool:
        return False


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The whole lines of a file of metrics; a line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


class Bar:
    """A progress bar with loss, tokens per second and the time that is left."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("training", total=None, numbers="")
        # When tokens were first counted, and how many there were: a resumed run brings those of
        # earlier days.
        self._first: tuple[float, float] | None = None
        self._held_out = ""

    def started(self, step: int, steps: int) -> None:
        self._first = (time.monotonic(), 0.0) if step == 0 else None
        self._progress.update(self._task, completed=step, total=steps)
        self._progress.start()

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        if "eval_loss" in metrics:
            self._held_out = f"  held-out {metrics['eval_loss']:.4f}"
        if "loss" not in metrics:
            return
        numbers = f"loss {metrics['loss']:.4f}{self._held_out}{self._rate(metrics['tokens'])}"
        self._progress.update(self._task, completed=step, numbers=numbers)

    def _rate(self, tokens: float) -> str:
        """Tokens per second since this process began; nothing yet at the first step of a resumed
        run.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = (now, tokens)
            return ""
        since, first = self._first
        return f"  {(tokens - first) / max(now - since, 1e-9):,.0f} tokens/s"

    def saved(self, step: int, path: Path) -> None:
        pass

    def wants_stop(self) -> bool:
        return False

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


def plot_losses(out: Path) -> Path:
    """Draw the losses of `metrics.jsonl` into `loss.png`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(out / METRICS)
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o-")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / PLOT, dpi=120)
    plt.close(figure)
    return out / PLOT
