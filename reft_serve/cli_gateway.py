"""`python -m reft_serve.cli_gateway`: an earlier name of `python -m reft_serve.cli.gateway`."""

from __future__ import annotations

import typer

from reft_serve.cli.gateway import gateway

__all__ = ["gateway"]

if __name__ == "__main__":
    typer.run(gateway)
