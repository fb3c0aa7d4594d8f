"""`reft-serve serve`: start vLLM with ReFT adapters."""

from __future__ import annotations

from typing import Annotated

import typer

from reft_serve.cli.save_options import (
    POSITIONS,
    Activation,
    Kind,
    Labels,
    LastOffset,
    LoraAlpha,
    NoBias,
    Phase,
    ProblemType,
    Untied,
)

__all__ = ["SETTINGS", "serve"]

SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True}


def serve(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="The base model: a directory, or a name that vLLM accepts."
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="An adapter directory or a pyreft save; repeatable."),
    ] = None,
    positions: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]SPEC", help=POSITIONS),
    ] = None,
    untied: Untied = False,
    last_offset: LastOffset = 0,
    activation: Activation = None,
    no_bias: NoBias = False,
    phase: Phase = "prompt",
    kind: Kind = None,
    lora_alpha: LoraAlpha = None,
    labels: Labels = None,
    problem_type: ProblemType = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the command and its environment without running it."),
    ] = False,
) -> None:
    """Serve MODEL and its adapters with vLLM's OpenAI server (port 8000). Other flags are passed to
    vLLM.
    """
    from reft_serve.adapters.importers.common import ImportFlags
    from reft_serve.engine.launch.plan import ServeRequest, become, plan

    flags = ImportFlags(
        None,
        untied,
        last_offset,
        activation,
        no_bias,
        phase,
        kind,
        lora_alpha,
        labels,
        problem_type,
    )
    chosen = plan(ServeRequest(model, adapter or (), positions or (), flags, context.args))
    for reason in chosen.reasons:
        typer.echo(reason, err=True)
    if dry_run:
        typer.echo(chosen.shell())
    else:
        become(chosen)
