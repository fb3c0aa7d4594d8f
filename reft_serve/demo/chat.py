"""The chat demonstration: `python -m reft_serve.demo.chat MODEL_DIR`. A chat model learns to answer
in emoji.

`reft-serve up` serves the model, a fine-tuning job trains an adapter on ten examples over the API,
and the model answers with and without the adapter, side by side. Exit code 0 only if the adapter
alone answers at least half of the questions in emoji; processors round differently, so that the
same ten examples give slightly different adapters.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from reft_serve.demo.upserver import UpServer, running_up
from reft_serve.errors import ServiceError

__all__ = ["EXAMPLES", "HYPERPARAMETERS", "QUESTIONS", "is_emoji", "main"]

EXAMPLES = Path(__file__).with_name("emoji.jsonl")
BASE, ADAPTER = "smollm2", "emoji"
# Found by trying. The layers below 18 give the same in each step, so they run once.
HYPERPARAMETERS: dict[str, Any] = {
    "n_epochs": 30,
    "batch_size": 10,
    "layers": [18, 24],
    "positions": "f3+l3",
    "learning_rate": 0.006,
    "save_every": 30,
}
QUESTIONS = tuple(Path(__file__).with_name("questions.txt").read_text().splitlines())
_TOKENS = 48
# The answers are computed in the precision of the training.
_FLAGS = ("--max-model-len", "2048", "--enforce-eager", "--dtype", "float32")
_WORD = re.compile(r"[^\W\d_]{2,}")


def is_emoji(text: str) -> bool:
    """Whether an answer has symbols outside the letters' planes and no word."""
    return any(ord(character) > 0x2190 for character in text) and not _WORD.search(text)


def main(argv: Sequence[str] | None = None) -> None:
    """The script."""
    parser = argparse.ArgumentParser(
        description="Train a chat model to answer in emoji and chat with it."
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL_DIR", help="what `scripts/models smollm2` prints"
    )
    parser.add_argument(
        "--no-input", action="store_true", help="do not ask for questions at the end"
    )
    arguments = parser.parse_args(argv)
    if not arguments.model.is_dir():
        parser.error(f"there is no directory {arguments.model}")
    console = Console()
    try:
        sys.exit(
            asyncio.run(
                _demonstrate(
                    console, arguments.model, ask=not arguments.no_input and sys.stdin.isatty()
                )
            )
        )
    except ServiceError as exc:
        console.print(Text(str(exc), style="red"))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


async def _demonstrate(console: Console, model: Path, *, ask: bool) -> int:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="reft-chat-") as folder:
        async with running_up(model, Path(folder), ["--name", BASE, *_FLAGS], console) as server:
            tuned = await _train(console, server)
            console.print(
                f"\n[bold]{BASE}[/] without and with the adapter, greedy, at the same time:\n"
            )
            answers = [
                await _side_by_side(console, server.client, tuned, each) for each in QUESTIONS
            ]
            seconds = time.monotonic() - begun
            while ask and (question := _question(console)):
                await _side_by_side(console, server.client, tuned, question)
    changed = sum(is_emoji(adapter) and not is_emoji(base) for base, adapter in answers)
    console.print(
        f"\nThe adapter alone answers {changed} of {len(answers)} questions in emoji. "
        f"{seconds:.0f} s in all."
    )
    return 0 if 2 * changed >= len(answers) else 1


async def _train(console: Console, server: UpServer) -> str:
    """The name of the model that a fine-tuning job makes of the ten examples.

    Raises:
        ServiceError: the job failed.
    """
    client, begun = server.client, time.monotonic()
    file = await client.files.create(file=EXAMPLES, purpose="fine-tune")
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}}
    job = await client.fine_tuning.jobs.create(
        model=BASE, training_file=file.id, suffix=ADAPTER, seed=1, method=method
    )
    console.print(
        f"\nFine-tuning job {job.id} on {len(EXAMPLES.read_text().splitlines())} examples"
    )
    columns = (
        TextColumn("  training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=2) as bar:
        task = bar.add_task("training", total=None, loss="")
        while job.status not in ("succeeded", "failed", "cancelled"):
            await asyncio.sleep(1)
            job = await client.fine_tuning.jobs.retrieve(job.id)
            progress = (job.model_extra or {}).get("progress") or {}
            bar.update(task, completed=progress.get("step") or 0, total=progress.get("steps"))
            bar.update(task, loss=await _loss(client, job.id))
    if job.fine_tuned_model is None:
        raise ServiceError(
            f"the job has {job.status}: {job.error.message if job.error else 'no reason is given'}"
        )
    console.print(
        f"[green]{job.fine_tuned_model}[/] is ready after {time.monotonic() - begun:.0f} s"
    )
    return job.fine_tuned_model


async def _loss(client: AsyncOpenAI, job: str) -> str:
    events = await client.fine_tuning.jobs.list_events(job, limit=5)
    metrics = [event.data for event in events.data if isinstance(event.data, dict)]
    losses = [each["train_loss"] for each in metrics if "train_loss" in each]
    return f"loss {losses[0]:.2f}" if losses else ""


async def _side_by_side(
    console: Console, client: AsyncOpenAI, tuned: str, question: str
) -> tuple[str, str]:
    """What the base and the adapter answer, shown as it comes."""
    texts = {BASE: "", tuned: ""}

    def table() -> Table:
        answers_table = Table(title=Text(question, style="bold"), title_justify="left", expand=True)
        answers_table.add_column(BASE, ratio=1)
        answers_table.add_column(f"{BASE} + {ADAPTER}", ratio=1)
        answers_table.add_row(Text(texts[BASE].strip()), Text(texts[tuned].strip()))
        return answers_table

    async def answer(model: str) -> None:
        chunks = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=_TOKENS,
            temperature=0,
            stream=True,
        )
        async for chunk in chunks:
            if chunk.choices:
                texts[model] += chunk.choices[0].delta.content or ""
                live.update(table())

    with Live(table(), console=console, refresh_per_second=12) as live:
        await asyncio.gather(*(answer(model) for model in texts))
        live.update(table())
    if not console.is_terminal:
        console.print()  # Live ends no line in a file
    return texts[BASE], texts[tuned]


def _question(console: Console) -> str:
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        return console.input("\n[bold]Ask something[/] (an empty line ends): ").strip()
    return ""


if __name__ == "__main__":
    main()
