"""`python -m reft_serve.cli_up`: an earlier name of `python -m reft_serve.cli.up`."""

from __future__ import annotations

import typer

from reft_serve.cli.up import SETTINGS, up

__all__ = ["up"]

if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(context_settings=SETTINGS)(up)
    app()
