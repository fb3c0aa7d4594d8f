"""`reft-serve adapter`: import, export, inspect and check adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from reft_serve.adapters.directory import Adapter

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Import, export, inspect and check ReFT adapters.")

_Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Directory to create; it must not exist.")
]
_Base = Annotated[
    Path, typer.Option("--base", metavar="MODEL_DIR", help="Local directory of the base model.")
]
_Adapter = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the adapter.")]


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="A pyreft save, a checkpoint or an AdapterHub save."),
    ],
    base: _Base,
    out: _Out,
    positions: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help=POSITIONS),
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
) -> None:
    """Convert a save of another library into an adapter directory."""
    from reft_serve.adapters.base_model import read_base_model
    from reft_serve.adapters.base_modules import linear_modules
    from reft_serve.adapters.importers.common import ImportFlags
    from reft_serve.adapters.importers.detection import import_adapter

    flags = ImportFlags(
        positions,
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
    adapter = import_adapter(
        source,
        read_base_model(base),
        out,
        flags,
        _max_bytes(),
        modules=lambda: linear_modules(base),
    )
    _warn(adapter)
    typer.echo(f"{out}: {_summary(adapter)}")


@app.command()
def export(
    adapter_dir: _Adapter,
    out: _Out,
    format_: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="Format to write: pyreft.")
    ] = "pyreft",
) -> None:
    """Write an adapter in the format of another library."""
    from reft_serve.adapters.directory import read_adapter
    from reft_serve.adapters.importers.pyreft_export import export_pyreft, import_flags
    from reft_serve.errors import ClientError

    if format_ != "pyreft":
        raise ClientError(f"--format {format_[:40]!r} is not supported; use pyreft")
    adapter = read_adapter(adapter_dir, _max_bytes())
    export_pyreft(adapter, out)
    _warn(adapter)
    typer.echo(
        f"{out}: {len(adapter.weights)} interventions. pyreft does not record "
        f"{import_flags(adapter)}"
    )


@app.command()
def inspect(
    adapter_dir: _Adapter,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print an adapter's base model, positions, interventions and digest."""
    from reft_serve.adapters.directory import TENSORS, read_adapter
    from reft_serve.adapters.lora import TENSORS as LORA_TENSORS

    adapter = read_adapter(adapter_dir, _max_bytes())
    size = (adapter_dir / TENSORS).stat().st_size
    if adapter.lora is not None:
        size += len(adapter.lora.files[LORA_TENSORS])
    if as_json:
        rank = None if adapter.lora is None else adapter.lora.rank
        facts = {
            "parameters": _parameters(adapter),
            "bytes": size,
            "digest": adapter.digest,
            "lora_rank": rank,
        }
        typer.echo(
            json.dumps(
                {**adapter.manifest.model_dump(mode="json"), **facts, "warnings": adapter.warnings},
                indent=2,
            )
        )
        return
    _warn(adapter)
    _show(adapter, size)


@app.command()
def check(
    adapter_dir: _Adapter,
    base: Annotated[
        Path | None, typer.Option(metavar="MODEL_DIR", help="Also check against this base model.")
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Largest rank that the engine supports.")
    ] = None,
) -> None:
    """Check that an adapter can be served. Prints one line, or one line per fault with exit
    code 1.
    """
    from reft_serve.adapters.base_model import read_base_model
    from reft_serve.adapters.base_modules import linear_modules
    from reft_serve.adapters.directory import read_adapter
    from reft_serve.adapters.manifest import EngineLimits
    from reft_serve.errors import AdapterInvalid

    try:
        adapter = read_adapter(adapter_dir, _max_bytes())
        facts = adapter.manifest.base_model if base is None else read_base_model(base)
        faults = tuple(EngineLimits(max_rank=max_rank).faults(adapter.manifest, facts))
        if adapter.lora is not None and base is not None:
            faults += tuple(adapter.lora.misfits(linear_modules(base)))
    except AdapterInvalid as exc:
        faults = exc.faults
    for fault in faults:
        typer.echo(fault)
    if faults:
        raise typer.Exit(1)
    _warn(adapter)
    typer.echo(f"{adapter_dir}: sound. {_summary(adapter)}")


def _max_bytes() -> int:
    from reft_serve.config import EngineSettings, read_settings

    return read_settings(EngineSettings).max_adapter_bytes


def _warn(adapter: Adapter) -> None:
    for warning in adapter.warnings:
        typer.echo(f"warning: {warning}", err=True)


def _summary(adapter: Adapter) -> str:
    count = len(adapter.weights)
    lora = "" if adapter.lora is None else f" and a LoRA of rank {adapter.lora.rank}"
    spec = adapter.manifest.head
    head = "" if spec is None else f" and a head for {spec.task} with {len(spec.labels)} outputs"
    return (
        f"{count} intervention{'s' * (count != 1)}{lora}{head}, {_parameters(adapter)} parameters, "
        f"sha256 {adapter.digest}"
    )


def _parameters(adapter: Adapter) -> int:
    own = sum(
        tensor.numel() for weights in adapter.weights for tensor in weights.tensors().values()
    )
    own += (
        0
        if adapter.head is None
        else sum(tensor.numel() for tensor in adapter.head.tensors().values())
    )
    return own + (0 if adapter.lora is None else adapter.lora.parameters)


def _show(adapter: Adapter, size: int) -> None:
    from rich.console import Console
    from rich.table import Table

    manifest = adapter.manifest
    rule = adapter.manifest.positions
    base = manifest.base_model
    facts = Table(show_header=False, box=None)
    facts.add_row(
        "base",
        f"{base.name}: {base.architecture}, {base.num_hidden_layers} layers of {base.hidden_size}",
    )
    tied = "tied" if rule.tied else "untied"
    facts.add_row(
        "positions", f"{rule.spec}, {tied}, last offset {rule.last_offset}, phase {rule.phase}"
    )
    if adapter.lora is not None:
        facts.add_row("LoRA", f"rank {adapter.lora.rank}, {adapter.lora.parameters} parameters")
    if (head := manifest.head) is not None:
        form = (
            "one linear layer"
            if head.activation is None
            else f"a dense layer, {head.activation}, a linear layer"
        )
        facts.add_row(
            "head",
            f"{head.problem_type} on the {head.reads} token: {form}; {', '.join(head.labels[:20])}",
        )
    facts.add_row("parameters", f"{_parameters(adapter)} in {size} bytes")
    facts.add_row("digest", adapter.digest)
    rows = Table("layer", "component", "kind", "rank", "activation", "part", "dtype")
    for spec in manifest.interventions:
        cells = (
            spec.layer,
            spec.component,
            spec.kind,
            spec.rank,
            spec.activation,
            spec.part,
            spec.dtype,
        )
        rows.add_row(*(str(cell) for cell in cells))
    # Names come from the adapter's author: markup in them must not be rendered.
    Console(markup=False, highlight=False, emoji=False).print(facts, rows)
