"""Options for what a save of pyreft does not record, the same for `adapter import` and `serve`."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "POSITIONS",
    "Activation",
    "Kind",
    "Labels",
    "LastOffset",
    "LoraAlpha",
    "NoBias",
    "Phase",
    "ProblemType",
    "Untied",
]

POSITIONS = "Edited tokens of a pyreft save: f7+l7, f1, last, all, 0,-1 ..."
Untied = Annotated[
    bool,
    typer.Option("--untied", help="pyreft save: prefix and suffix have separate interventions."),
]
LastOffset = Annotated[
    int,
    typer.Option(metavar="N", help="pyreft save: tokens between the suffix and the prompt's end."),
]
Activation = Annotated[
    str | None, typer.Option(metavar="NAME", help="pyreft save: its act_fn; default: none.")
]
NoBias = Annotated[
    bool,
    typer.Option(
        "--no-bias", help="pyreft save: trained with add_bias=False (noreft and nodireft)."
    ),
]
Phase = Annotated[
    str,
    typer.Option(
        metavar="PHASE", help="pyreft save: whose tokens are edited: prompt, all or generated."
    ),
]
Kind = Annotated[
    str | None,
    typer.Option(metavar="KIND", help="pyreft checkpoint: its kind, which it does not record."),
]
LoraAlpha = Annotated[
    float | None,
    typer.Option(metavar="N", help="pyreft save that holds a LoRA: PEFT's lora_alpha."),
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES", help="pyreft save with a classifier head: names of its outputs, in order."
    ),
]
ProblemType = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Of that head: single_label_classification, multi_label_classification or regression.",
    ),
]
