"""`reft-serve evaluate`: score a served model on a recipe's questions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from reft_serve.evaluation.predictions import Prediction, Question, Server
    from reft_serve.evaluation.scoring import Score
    from reft_serve.recipes.recipe import Task

__all__ = ["evaluate"]


def evaluate(
    data: Annotated[
        list[Path],
        typer.Argument(metavar="DATA...", help="JSON or JSONL files of the recipe's rows."),
    ],
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE", help="commonsense, math, instruct, glue-cola, ... or a TOML."
        ),
    ],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Public name of the adapter or the base model.")
    ],
    url: Annotated[
        str, typer.Option(metavar="URL", help="URL of the server, with or without /v1.")
    ] = "http://127.0.0.1:8000",
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Output file of all predictions, as JSONL.")
    ] = Path("predictions.jsonl"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the predictions already in --out.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use only the first N rows of each file.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Largest number of tokens per response; default: the recipe's."
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=1024, metavar="N", help="Requests at once.")
    ] = 32,
    api_key: Annotated[
        str,
        typer.Option(envvar="OPENAI_API_KEY", show_default=False, help="API key of the server."),
    ] = "none",
) -> None:
    """Evaluate a served model on a recipe's questions over HTTP; print its accuracy and write every
    prediction.
    """
    from reft_serve.datafiles.formats import read_rows
    from reft_serve.datafiles.lines import FileLimits
    from reft_serve.errors import ClientError
    from reft_serve.evaluation.predictions import Server, questions, scores
    from reft_serve.recipes.recipe import load_recipe

    task = load_recipe(recipe).task
    if task is None:
        raise ClientError(f"recipe {recipe} has no [task] to evaluate")
    if max_tokens is not None:
        task = task.model_copy(update={"max_new_tokens": max_tokens})
    limits = FileLimits(unanswered=task.metric == "none")
    asked = [
        question for path in data for question in questions(read_rows(path, limits), task)[:limit]
    ]
    server = Server(url, model, api_key, concurrency)
    predictions = _asked(server, task, asked, out, resume=resume)
    if task.metric == "none":
        typer.echo(
            "this recipe defines no metric; judge the predictions with AlpacaEval's annotator"
        )
    else:
        _print(scores(task, predictions))
    typer.echo(f"{len(predictions):,} predictions written to {out}")
    failed = [prediction for prediction in predictions if prediction.error]
    if failed:
        first = failed[0]
        counted = "" if task.metric == "none" else "; they count as wrong"
        typer.echo(
            f"error: {len(failed):,} of {len(predictions):,} requests failed{counted}. The first, "
            f"{first.file} line {first.line}: {first.error}",
            err=True,
        )
        raise typer.Exit(1)


def _asked(
    server: Server, task: Task, asked: Sequence[Question], out: Path, *, resume: bool
) -> list[Prediction]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from reft_serve.evaluation.predictions import ask

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(asked))
        right = failed = 0

        def note(prediction: Prediction) -> None:
            nonlocal right, failed
            right = right + bool(prediction.correct)
            failed = failed + bool(prediction.error)
            shown = "" if task.metric in ("none", "pearson") else f"{right:,} right"
            progress.update(
                bar, advance=1, description=shown + (f", {failed:,} failed" if failed else "")
            )

        return asyncio.run(ask(server, task, asked, out, resume=resume, on_answer=note))


def _print(scores: Mapping[str, Score]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("set", "asked", "right", "accuracy", "95 % interval", "correlation")
    for name, score in scores.items():
        cells = ["", "", ""]
        if score.accuracy is not None:
            held = score.accuracy
            cells = [f"{held.correct:,}", f"{held.share:.1%}", f"{held.low:.1%} to {held.high:.1%}"]
        correlation = "" if score.correlation is None else f"{score.correlation:.3f}"
        table.add_row(name, f"{score.asked:,}", *cells, correlation)
    Console().print(table)
    shares = [score.accuracy.share for score in scores.values() if score.accuracy]
    if len(shares) > 1:
        typer.echo(f"mean of the {len(shares)} sets: {sum(shares) / len(shares):.1%}")
