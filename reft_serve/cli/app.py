"""The `reft-serve` command: verbs only. Each verb imports what it needs when it runs, so `--help`
needs no torch.
"""

from __future__ import annotations

from typing import NoReturn

import typer
from typer.core import TyperGroup

from reft_serve.cli import adapter, admin, evaluate, gateway, logs, serve, train, up, worker
from reft_serve.errors import ReftError

__all__ = ["app", "main"]


class _Sentences(TyperGroup):
    """Prints a `ReftError` as one sentence on stderr and exits with code 1."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except ReftError as exc:
            _fail(str(exc))
        except OSError as exc:
            _fail(f"cannot use {exc.filename}: {exc.strerror}")


def _fail(sentence: str) -> NoReturn:
    typer.echo(f"error: {sentence}", err=True)
    raise typer.Exit(1)


app = typer.Typer(cls=_Sentences, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.add_typer(adapter.app, name="adapter")
app.command("serve", context_settings=serve.SETTINGS)(serve.serve)
app.command("up", context_settings=up.SETTINGS)(up.up)
app.command("logs")(logs.logs)
app.command("gateway")(gateway.gateway)
app.add_typer(admin.app, name="admin")
app.command("train")(train.train)
app.command("worker")(worker.worker)
app.command("evaluate")(evaluate.evaluate)


@app.callback()
def _root() -> None:
    """Serve many trained ReFT adapters over one shared base model."""


def main() -> None:
    """The console entry point."""
    app()
