"""Adapters saved by pyreft: a `ReftModel.save` directory of any pyvene, or a trainer's checkpoint.

Layouts were read off pyreft 0.0.6 to 0.1.0 with pyvene 0.1.2 to 0.1.8. Nothing that a save names is
imported or run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from reft_serve.adapters.importers.common import (
    Imported,
    ImportFlags,
    Row,
    assemble,
    read_json,
    read_torch,
)
from reft_serve.adapters.importers.pyreft_head import is_head_parameter, read_head
from reft_serve.adapters.importers.pyreft_sites import (
    CONFIG,
    SaveFaults,
    Site,
    checkpoint_sites,
    recorded_sites,
)
from reft_serve.adapters.importers.pyreft_tensors import read_tensors
from reft_serve.adapters.lora import Lora, holds_lora, lora_of_parameters, read_lora
from reft_serve.adapters.manifest import BaseFacts, Part
from reft_serve.errors import (
    AdapterInvalid,
    AdapterNotFound,
    ClientError,
    ImportFlagMissing,
)
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import has_activation

__all__ = ["is_pyreft", "read_pyreft"]

CHECKPOINT = "intervenable_model"
EXTRA = "pytorch_model.bin"


def is_pyreft(path: Path) -> bool:
    """True if the directory looks like a pyreft save; its contents are not checked."""
    if (path / CHECKPOINT).is_dir() or any(path.glob("intkey_*.bin")):
        return True
    try:
        return "intervention_types" in read_json(path / CONFIG, str(path))
    except AdapterInvalid:
        return False


def read_pyreft(
    path: Path, base: BaseFacts, flags: ImportFlags, max_bytes: int = 1 << 30
) -> Imported:
    """Import a save of pyreft.

    Args:
        path: a `ReftModel.save` directory, a `checkpoint-N`, or its `intervenable_model`.
        base: the base model that it was trained on; a save does not record it.
        flags: what else it does not record.
        max_bytes: largest file to take into memory.

    Raises:
        ImportFlagMissing: a fact that must be given is not.
        AdapterUnsupported: it asks for something that is not served, named.
        AdapterInvalid: it is damaged, or a flag contradicts it; every fault found.
    """
    if not path.is_dir():
        raise AdapterNotFound(f"there is no directory at {path}")
    where = str(path)
    source = path / CHECKPOINT if (path / CHECKPOINT).is_dir() else path
    rule = flags.rule()
    faults = SaveFaults(where)
    if (source / CONFIG).is_file():
        sites = recorded_sites(read_json(source / CONFIG, where), base, flags, faults)
    else:
        sites = checkpoint_sites(source, base, flags, faults)
    parameters = _parameters(path, max_bytes, where)
    head = read_head(parameters, flags.label_names, flags.problem_type, faults.broken)
    lora = _lora(path, base, flags, max_bytes, faults)
    faults.settle()
    parts, warnings = _halves(sites, rule, faults)
    tensors = [read_tensors(source, place, max_bytes, where) for place in sites]
    _check_flags(sites, tensors, flags, faults)
    faults.settle()
    rows = [
        Row(p.layer, p.component, p.kind, t, p.file, flags.activation, part)
        for p, t, part in zip(sites, tensors, parts, strict=True)
    ]
    others = {"base_model": base, "positions": rule, "provenance": {"format": "pyreft"}}
    if head is None:
        return replace(assemble(rows, others, where, warnings), lora=lora)
    imported = assemble(rows, others | {"head": head[0]}, where, warnings, head[1])
    return replace(imported, lora=lora)


def _parameters(path: Path, max_bytes: int, where: str) -> dict[str, Tensor]:
    """What was trained of the base model itself."""
    inner = path / CHECKPOINT
    file = (inner if inner.is_dir() else path) / EXTRA
    return read_torch(file, max_bytes, where) if file.exists() else {}


def _lora(
    path: Path, base: BaseFacts, flags: ImportFlags, max_bytes: int, faults: SaveFaults
) -> Lora | None:
    """The LoRA that was trained with the interventions: PEFT's files next to them, or pyreft's own
    save without its alpha.
    """
    layers = base.num_hidden_layers
    inner = path / CHECKPOINT
    source = inner if inner.is_dir() else path
    trained = _parameters(path, max_bytes, faults.where)
    parameters = {name: tensor for name, tensor in trained.items() if not is_head_parameter(name)}
    others = sorted(name for name in parameters if "lora_" not in name)
    if others:
        faults.unsupported.append(
            f"{EXTRA} holds trained weights of the base model itself "
            f"({', '.join(others[:3])[:200]}), and only interventions, a classifier head and a "
            "LoRA are supported"
        )
        return None
    beside = next((folder for folder in (source, path) if holds_lora(folder)), None)
    if beside is not None:
        return read_lora(beside, layers, max_bytes)
    if not parameters:
        if flags.lora_alpha is not None:
            raise ClientError("--lora-alpha was given, but the save holds no LoRA")
        return None
    if flags.lora_alpha is None:
        raise ImportFlagMissing(
            f"{EXTRA} holds {len(parameters)} tensors of a LoRA (such as "
            f"{min(parameters)[:120]!r}), and pyreft does not record its scale: give "
            "--lora-alpha, or put PEFT's adapter_config.json and adapter_model.safetensors next "
            "to it"
        )
    return lora_of_parameters(parameters, flags.lora_alpha, layers, faults.where)


def _halves(
    sites: list[Site], rule: PositionRule, faults: SaveFaults
) -> tuple[list[Part], list[str]]:
    half = len(sites) // 2
    layout = [(place.layer, place.component) for place in sites]
    for (layer, component), count in Counter(layout).items():
        if count > 2:
            faults.unsupported.append(
                f"it has {count} interventions at layer {layer} {component}, each for different "
                "tokens, which the save does not record: at one layer and component, edit all "
                "positions, or the prefix and the suffix separately"
            )
    if faults.unsupported:
        return ["both"] * len(sites), []
    doubled = bool(half) and layout[:half] == layout[half:]
    if rule.tied:
        warning = (
            "its second half repeats the layers of its first, as pyreft saves untied f+l "
            "interventions: if it was trained without --share_weights, import it with --untied"
        )
        return ["both"] * len(sites), [warning] if doubled else []
    if len(sites) % 2:
        faults.broken.append(
            "--untied needs an even number of interventions, first those of the prefix, then "
            f"those of the suffix, and it has {len(sites)}"
        )
    elif not doubled:
        faults.broken.append(
            "--untied needs the same layers twice, first for the prefix and then for the suffix, "
            "and its halves differ"
        )
    parts: list[Part] = ["prefix"] * half
    parts += ["suffix"] * (len(sites) - half)
    return parts, []


def _check_flags(
    sites: list[Site], tensors: list[dict[str, Tensor]], flags: ImportFlags, faults: SaveFaults
) -> None:
    if flags.activation and not any(has_activation(place.kind) for place in sites):
        faults.broken.append(f"--activation was given, but a {sites[0].kind} has none")
    if flags.no_bias:
        biased = [place.file for place, held in zip(sites, tensors, strict=True) if "b2" in held]
        if biased:
            faults.broken.append(f"--no-bias was given, but {biased[0]} holds proj_layer.bias")
        elif not any(place.kind in ("noreft", "nodireft") for place in sites):
            raise ClientError("--no-bias is for noreft and nodireft, which this save does not hold")
