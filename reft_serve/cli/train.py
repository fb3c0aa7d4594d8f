"""`reft-serve train`: train an adapter on a file of examples."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from reft_serve.recipes.recipe import Recipe
    from reft_serve.training.loop.run import Outcome
    from reft_serve.training.loop.tasks import HeadAsk
    from reft_serve.training.model.parent import Parent
    from reft_serve.training.plan import AdapterPlan, Plan

__all__ = ["train"]

_MAX_TOKENS = 512


def train(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="JSONL of chats, prompts and completions, or preferences."
        ),
    ],
    base: Annotated[
        Path, typer.Option(metavar="MODEL_DIR", help="Local directory of the base model.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Directory of the run; the adapter is DIR/adapter."
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="A named recipe or a TOML file; options on the command line override it.",
        ),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA", help="Held-out examples; the best checkpoint on them is kept."
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="loreft, direft, noreft ... [loreft]")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="Rank of each intervention. [4]")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="SPEC", help="all, or numbers such as 3,9 or 0-5. [all]")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Edited tokens: f7+l7, f1, last ... [f7+l7]")
    ] = None,
    untied: Annotated[
        bool | None,
        typer.Option("--untied/--tied", help="Prefix and suffix have separate interventions."),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Activation of W h + b, such as relu. [linear]"),
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(metavar="P", help="Dropout on the edited states. [0]")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(metavar="N", help="Also train a LoRA of this rank.")
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(metavar="A", help="PEFT's lora_alpha. [twice the LoRA's rank]")
    ] = None,
    lora_targets: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Linear layers of the LoRA: q_proj,v_proj ... [PEFT's choice]"
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="supervised or dpo. [by the format of the data]"),
    ] = None,
    dpo_beta: Annotated[float | None, typer.Option(metavar="B", help="DPO's beta. [0.1]")] = None,
    epochs: Annotated[
        float | None, typer.Option(metavar="N", help="Passes over the data. [3]")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after this many optimiser steps.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Examples per micro-batch. [16]")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(metavar="N", help="Micro-batches per optimiser step. [1]")
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", metavar="RATE", help="Learning rate. [9e-4]")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(metavar="NAME", help="linear, cosine or constant. [linear]")
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of the steps used for warm-up. [0.1]"),
    ] = None,
    clip: Annotated[
        float | None, typer.Option(metavar="NORM", help="Largest gradient norm. [1]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="Data type of the frozen base model. [float32]"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Use less memory; about a third slower."),
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Use torch.compile: half a minute slower to start, then slightly faster. For long "
            "runs.",
        ),
    ] = False,
    keep_states: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            help="Cache for hidden states below the lowest edited layer; 0: none. [1]",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help=f"Skip (and count) examples with more tokens. [{_MAX_TOKENS}]"
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Seed of initial weights, order and dropout. [42]"),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(metavar="N", help="Optimiser steps between checkpoints. [one epoch]"),
    ] = None,
    parent: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="Continue from this adapter, run or checkpoint: its structure and its weights.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out.")
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="classification or regression of labelled texts, or reward of preferences: a "
            "classifier head learns too.",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Of the head's outputs, in order. [those of the data, sorted]"
        ),
    ] = None,
    head_reads: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT", help="first, last or mean of the tokens. [as the base: first, last]"
        ),
    ] = None,
    head_activation: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="After the head's dense layer; none: one linear layer. [as the base: tanh, none]",
        ),
    ] = None,
    report_to: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Reports of transformers: tensorboard, wandb."),
    ] = None,
) -> None:
    """Train an adapter on a frozen base model."""
    from reft_serve.recipes.recipe import load_recipe

    chosen = None if recipe is None else load_recipe(recipe)
    version = None if parent is None else _version(parent)
    adapter = _set_options(
        kind=kind,
        rank=rank,
        layers=layers,
        positions=positions,
        untied=untied,
        activation=activation,
        dropout=dropout,
    )
    lora_options = None if lora_rank is None else (lora_rank, lora_alpha, lora_targets)
    run = _set_options(
        method=method,
        dpo_beta=dpo_beta,
        epochs=epochs,
        max_steps=max_steps,
        batch=batch,
        accumulate=accumulate,
        learning_rate=lr,
        schedule=schedule,
        warmup=warmup,
        clip=clip,
        dtype=dtype,
        seed=seed,
        save_every=save_every,
        keep_states=keep_states,
    )
    reports = tuple(report_to.split(",")) if report_to else ()
    if version is not None:
        adapter = _inherited(version, base, adapter, lora_options)
        lora_options = None
    plan = replace(
        _plan(base, chosen, adapter, run, lora_options),
        gradient_checkpointing=gradient_checkpointing,
        compile=compiled,
        report_to=reports,
    )
    if version is not None:
        plan = version.plan(plan)
    longest = max_tokens or (_MAX_TOKENS if chosen is None else chosen.training.max_tokens)
    if task is not None:
        from reft_serve.errors import ClientError
        from reft_serve.training.loop.tasks import HeadAsk

        if version is not None:
            raise ClientError("--task trains from the base model: it cannot be used with --from")

        names = tuple(label.strip() for label in labels.split(",")) if labels else ()
        ask = HeadAsk(task, names, head_reads, head_activation)
        rule_given = positions is not None or untied is not None or chosen is not None
        _run_head(data, validation, base, plan, ask, longest, out, resume, rule_given=rule_given)
        return
    _run(
        data,
        validation,
        base,
        plan,
        chosen,
        longest,
        out,
        resume,
        method_given=method is not None,
        parent=version,
    )


def _version(path: Path) -> Parent:
    from reft_serve.training.model.parent import read_parent

    return read_parent(path)


def _inherited(
    version: Parent,
    base: Path,
    adapter: dict[str, Any],
    lora_options: tuple[int, float | None, str | None] | None,
) -> dict[str, Any]:
    """What the command line says of the adapter apart from its structure, which is the parent's.

    Raises:
        ClientError: it says something else of the structure.
    """
    from reft_serve.adapters.base_model import read_base_model
    from reft_serve.training.plan import parse_layers

    facts, asked = read_base_model(base), dict(adapter)
    if "layers" in asked:
        layers = parse_layers(asked["layers"], facts.num_hidden_layers)
        asked["layers"] = list(range(facts.num_hidden_layers) if layers is None else layers)
    if "untied" in asked:
        asked["tied"] = not asked.pop("untied")
    if lora_options is not None:
        rank, alpha, targets = lora_options
        asked |= _set_options(
            lora_rank=rank, lora_alpha=alpha, lora_targets=targets.split(",") if targets else None
        )
    version.check(asked, facts)
    return _set_options(dropout=adapter.get("dropout"))


def _set_options(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _plan(
    base: Path,
    recipe: Recipe | None,
    adapter: dict[str, Any],
    run: dict[str, Any],
    lora_options: tuple[int, float | None, str | None] | None,
) -> Plan:
    """The recipe's plan, overridden by the options on the command line."""
    from reft_serve.adapters.base_model import read_base_model
    from reft_serve.training.plan import LoraPlan, Plan, parse_layers, plan_from_recipe

    start = Plan() if recipe is None else plan_from_recipe(recipe)
    if "layers" in adapter:
        adapter["layers"] = parse_layers(adapter["layers"], read_base_model(base).num_hidden_layers)
    rule = start.adapter.rule
    if "positions" in adapter:
        rule = replace(rule, spec=adapter.pop("positions"), tied=not adapter.pop("untied", False))
    elif "untied" in adapter:
        rule = replace(rule, tied=not adapter.pop("untied"))
    shape: AdapterPlan = replace(start.adapter, rule=rule, **adapter)
    lora = None
    if lora_options is not None:
        rank, alpha, targets = lora_options
        lora = LoraPlan(
            rank, alpha or 2.0 * rank, targets=tuple(targets.split(",")) if targets else None
        )
    return replace(start, adapter=shape, lora=lora, **run)


def _run(
    data: Path,
    validation: Path | None,
    base: Path,
    plan: Plan,
    recipe: Recipe | None,
    max_tokens: int,
    out: Path,
    resume: bool,
    *,
    method_given: bool,
    parent: Parent | None,
) -> None:
    from rich.console import Console
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from reft_serve.datafiles.formats import read_rows
    from reft_serve.training.data.encoding import encode
    from reft_serve.training.loop.report import Bar
    from reft_serve.training.loop.run import fresh_because, started_at, train
    from reft_serve.training.model.parent import data_lineage
    from reft_serve.training.model.processes import of_main_process, this_process

    console = Console(quiet=not this_process().is_main_process)
    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    task = None if recipe is None else recipe.task
    started = of_main_process((started_at(out) if resume else None) or datetime.now())
    # Both files are read whole before the base model is loaded, so that all faults are reported at
    # once.
    read = [
        encode(read_rows(path), tokenizer, max_tokens=max_tokens, task=task, now=started)
        for path in (data, validation)
        if path
    ]
    for note in (note for each in read for note in each.notes()):
        console.print(f"note: {note}", markup=False, highlight=False)
    if not method_given and read[0].preferences:
        plan = replace(plan, method="dpo")
    items, held_out, *_ = [(each.preferences or each.examples) for each in read] + [()]
    fingerprints = [each.fingerprint for each in read]
    if parent is not None:
        fresh = fresh_because(parent, plan, items, fingerprints)
        how = (
            f"after step {parent.step}, with the optimiser's state"
            if fresh is None
            else f"with a new optimiser: {fresh}"
        )
        console.print(f"note: continues from {parent.name} {how}", markup=False, highlight=False)
    bar = Bar(console)
    try:
        outcome = train(
            base,
            plan,
            items,
            out,
            held_out=held_out,
            resume=resume,
            watchers=[bar],
            fingerprints=fingerprints,
            started=started,
            parent=parent,
            lineage=data_lineage(data, validation) if parent is not None else {},
        )
    finally:
        bar.stop()
    _show(console, outcome, out)


def _run_head(
    data: Path,
    validation: Path | None,
    base: Path,
    plan: Plan,
    ask: HeadAsk,
    max_tokens: int,
    out: Path,
    resume: bool,
    *,
    rule_given: bool,
) -> None:
    """Train a classifier head beside the interventions."""
    from rich.console import Console
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from reft_serve.datafiles.formats import read_rows
    from reft_serve.training.loop.report import Bar
    from reft_serve.training.loop.run import started_at, train
    from reft_serve.training.loop.tasks import prepare
    from reft_serve.training.model.processes import of_main_process, this_process

    console = Console(quiet=not this_process().is_main_process)
    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    files = [read_rows(path) for path in (data, validation) if path]
    started = of_main_process((started_at(out) if resume else None) or datetime.now())
    ready = prepare(
        ask, base, plan, files, tokenizer, max_tokens=max_tokens, rule_given=rule_given, now=started
    )
    for note in ready.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    items, held_out, *_ = [*ready.items, ()]
    bar = Bar(console)
    try:
        outcome = train(
            base,
            ready.plan,
            items,
            out,
            held_out=held_out,
            resume=resume,
            watchers=[bar],
            fingerprints=ready.fingerprints,
            started=started,
        )
    finally:
        bar.stop()
    _show(console, outcome, out)
    for name, value in sorted(_measured(out, outcome.best_step).items()):
        console.print(f"held-out {name}: {value:.4f}", markup=False, highlight=False)


def _measured(out: Path, step: int | None) -> dict[str, float]:
    """The held-out metrics of a step, except the loss; empty without held-out data."""
    from reft_serve.training.loop.report import METRICS, read_metrics

    rows = read_metrics(out / METRICS)
    row_of_step = next(
        (row for row in reversed(rows) if row["step"] == step and "eval_loss" in row), {}
    )
    return {
        name.removeprefix("eval_"): value
        for name, value in row_of_step.items()
        if name.startswith("eval_") and name != "eval_loss"
    }


def _show(console: Console, outcome: Outcome, out: Path) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("adapter", f"{outcome.adapter}")
    table.add_row("sha256", f"{outcome.digest}")
    table.add_row(
        "trained", f"{outcome.parameters:,} parameters, {outcome.share:.4%} of the base's"
    )
    table.add_row("on disk", f"{outcome.size:,} bytes")
    if outcome.best_loss is not None:
        table.add_row("held-out loss", f"{outcome.best_loss:.4f} at step {outcome.best_step}")
    table.add_row(
        "time", f"{outcome.seconds:.1f} s for {outcome.steps:,} steps, {outcome.tokens:,} tokens"
    )
    table.add_row("peak memory", f"{outcome.peak_memory / 2**20:,.0f} MiB")
    table.add_row("record", f"{out}/metrics.jsonl, {out}/loss.png, {out}/summary.json")
    console.print(table)
