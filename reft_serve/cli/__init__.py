"""The `reft-serve` command, one module per verb."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """The console entry point."""
    from reft_serve.cli.app import main as run

    run()
