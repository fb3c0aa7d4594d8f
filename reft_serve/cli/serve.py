"""`reft-serve serve`: start vLLM with ReFT adapters."""

from __future__ import annotations

from typing import Annotated

import typer

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
        typer.Option(
            metavar="[NAME=]SPEC",
            help="Edited tokens of a pyreft save: f7+l7, f1, last, all, 0,-1 ...",
        ),
    ] = None,
    untied: Annotated[
        bool,
        typer.Option(
            "--untied", help="pyreft save: prefix and suffix have separate interventions."
        ),
    ] = False,
    last_offset: Annotated[
        int,
        typer.Option(
            metavar="N", help="pyreft save: tokens between the suffix and the prompt's end."
        ),
    ] = 0,
    activation: Annotated[
        str | None, typer.Option(metavar="NAME", help="pyreft save: its act_fn.")
    ] = None,
    no_bias: Annotated[
        bool, typer.Option("--no-bias", help="pyreft save: trained with add_bias=False.")
    ] = False,
    phase: Annotated[
        str, typer.Option(metavar="PHASE", help="pyreft save: prompt, all or generated.")
    ] = "prompt",
    kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="pyreft checkpoint: its kind, which it does not record."),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(metavar="N", help="pyreft save that holds a LoRA: PEFT's lora_alpha."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="pyreft save with a classifier head: its outputs: names, in order.",
        ),
    ] = None,
    problem_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Of that head: single_label_classification, multi_label_classification or "
            "regression.",
        ),
    ] = None,
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
