"""`reft-serve logs`: follow the logs of a `reft-serve up` on this machine."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["logs"]

_POLL_SECONDS = 0.2


class _Process(StrEnum):
    engine = "engine"
    gateway = "gateway"
    worker = "worker"


def logs(
    process: Annotated[
        _Process | None,
        typer.Argument(metavar="[PROCESS]", help="engine, gateway or worker. [all three]"),
    ] = None,
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="The --data of `reft-serve up`.")
    ] = Path("~/.local/share/reft-serve"),
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, help="Existing lines to show first.")
    ] = 20,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Wait for more until Ctrl-C.")
    ] = True,
    raw: Annotated[
        bool, typer.Option("--raw", help="Show the lines as the file holds them.")
    ] = False,
) -> None:
    """Show the logs of the engine, the gateway and the training worker, and follow them."""
    from rich.console import Console

    from reft_serve.cli.logfiles import NAMES, LogFiles, Tail
    from reft_serve.cli.terminal import describe
    from reft_serve.errors import ServiceError

    files = LogFiles(data.expanduser().resolve())
    if not files.folder.is_dir():
        raise ServiceError(
            f"there are no logs in {files.folder}: `reft-serve up` writes them "
            "if its output is a terminal"
        )
    chosen = NAMES if process is None else (process.value,)
    tails = {name: Tail(files.path(name), lines) for name in chosen}
    console = Console(soft_wrap=True)
    try:
        while True:
            for name, tail in tails.items():
                for line in tail.read():
                    if raw:
                        typer.echo(line)
                    elif (shown := describe(name, line, everything=True)) is not None:
                        console.print(shown)
            if not follow:
                return
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        return
