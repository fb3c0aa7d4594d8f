"""`python -m reft_serve.cli_worker`: an earlier name of `python -m reft_serve.cli.worker`."""

from __future__ import annotations

import typer

from reft_serve.cli.worker import worker

__all__ = ["worker"]

if __name__ == "__main__":
    typer.run(worker)
