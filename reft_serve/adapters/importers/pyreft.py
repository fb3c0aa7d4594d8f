"""Adapters saved by pyreft: a `ReftModel.save` directory of any pyvene, or a trainer's checkpoint.

Layouts were read off pyreft 0.0.6 to 0.1.0 with pyvene 0.1.2 to 0.1.8. Nothing that a save names is
imported or run.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from reft_serve.adapters.importers.common import (
    Imported,
    ImportFlags,
    Row,
    assemble,
    read_json,
    read_torch,
    rotation,
)
from reft_serve.adapters.importers.components import PlaceUnknown, resolve_component
from reft_serve.adapters.importers.pyreft_head import is_head_parameter, read_head
from reft_serve.adapters.lora import Lora, holds_lora, lora_of_parameters, read_lora
from reft_serve.adapters.manifest import BaseFacts, Part
from reft_serve.errors import (
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    ClientError,
    ImportFlagMissing,
)
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import KINDS, Component, Kind, has_activation

__all__ = ["is_pyreft", "read_pyreft"]

CONFIG = "config.json"
CHECKPOINT = "intervenable_model"
EXTRA = "pytorch_model.bin"
FIELDS = (
    *(
        "layer",
        "component",
        "unit",
        "max_number_of_units",
        "low_rank_dimension",
        "intervention_type",
        "intervention",
    ),
    *("subspace_partition", "group_key", "intervention_link_key", "moe_key"),
    *("source_representation", "hidden_source_representation", "latent_dim"),
)
_REFUSED_FIELDS = FIELDS[7:13]
_CLASSES: dict[str, Kind] = {f"{kind.capitalize()}Intervention": kind for kind in KINDS}
# Classes that add one vector to the hidden state, or take it away: lobireft of rank 1. pyvene's
# hold it as their source.
_VECTOR_CLASSES: dict[str, float] = {
    "BiasIntervention": 1,
    "AdditionIntervention": 1,
    "SubtractionIntervention": -1,
}
_VECTOR_NAMES = ("bias", "source_representation")
_KEY = re.compile(r"[\w.\[\]]{1,512}#\d{1,4}")
# Both namings: "layer_8_comp_block_output_unit_pos_nunit_1#0", and with dots (and "repr") before
# pyvene 0.1.7.
_KEY_PARTS = re.compile(
    r"layer[_.](\d{1,5})[_.](?:comp|repr)[_.](\w+)[_.]unit[_.](\w+)[_.]nunit[_.](\d+)#(\d+)"
)
_NAMES = {
    "weight": "W",
    "bias": "b",
    "learned_source": "b",
    "learned_source.weight": "W",
    "learned_source.bias": "b",
    "proj_layer.weight": "W2",
    "proj_layer.bias": "b2",
}
_MAX_ROWS = 8192


@dataclass(frozen=True, slots=True)
class _Place:
    key: str
    kind: Kind
    layer: int
    component: Component
    sign: float | None = None
    """Of a class that adds one vector or takes it away; None for a kind of pyreft's own."""

    @property
    def file(self) -> str:
        return f"intkey_{self.key}.bin"


@dataclass(slots=True)
class _Faults:
    """Faults of a save; those in `unsupported` are unsupported features of a valid save."""

    where: str
    broken: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)

    def settle(self) -> None:
        if self.broken:
            raise AdapterInvalid(self.where, self.broken + self.unsupported)
        if self.unsupported:
            raise AdapterUnsupported(self.where, self.unsupported)


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
    faults = _Faults(where)
    if (source / CONFIG).is_file():
        places = _recorded_places(read_json(source / CONFIG, where), base, flags, faults)
    else:
        places = _checkpoint_places(source, base, flags, faults)
    parameters = _parameters(path, max_bytes, where)
    head = read_head(parameters, flags.label_names, flags.problem_type, faults.broken)
    lora = _lora(path, base, flags, max_bytes, faults)
    faults.settle()
    parts, warnings = _halves(places, rule, faults)
    tensors = [_read_tensors(source, place, max_bytes, where) for place in places]
    _check_flags(places, tensors, flags, faults)
    faults.settle()
    rows = [
        Row(p.layer, p.component, p.kind, t, p.file, flags.activation, part)
        for p, t, part in zip(places, tensors, parts, strict=True)
    ]
    others = {"base_model": base, "positions": rule, "provenance": {"format": "pyreft"}}
    if head is None:
        return replace(assemble(rows, others, where, warnings), lora=lora)
    imported = assemble(rows, others | {"head": head[0]}, where, warnings, head[1])
    return replace(imported, lora=lora)


def _recorded_places(
    config: dict[str, Any], base: BaseFacts, flags: ImportFlags, faults: _Faults
) -> list[_Place]:
    rows, types, keys = (
        config.get(name) for name in ("representations", "intervention_types", "sorted_keys")
    )
    if (
        not (isinstance(rows, list) and isinstance(types, list) and isinstance(keys, list))
        or not rows
    ):
        faults.broken.append(
            f"{CONFIG} must list representations, intervention_types and sorted_keys"
        )
        return []
    # Some versions of pyvene name the files in sorted_keys, others the interventions.
    keys = [key.removeprefix("intkey_") if isinstance(key, str) else key for key in keys]
    if not len(rows) == len(types) == len(keys) <= _MAX_ROWS:
        lengths = f"{len(rows)}, {len(types)} and {len(keys)}"
        faults.broken.append(
            f"{CONFIG}: representations, intervention_types and sorted_keys have {lengths} entries"
        )
        return []
    if config.get("mode", "parallel") != "parallel":
        faults.unsupported.append(
            f"its mode is {str(config['mode'])[:40]!r}; only parallel interventions are supported"
        )
    if len({str(key) for key in keys}) < len(keys):
        faults.broken.append(f"{CONFIG}: sorted_keys names one intervention twice")
    places = []
    for k, (row, recorded, key) in enumerate(zip(rows, types, keys, strict=True)):
        kind, sign = _recorded_kind(k, recorded, flags, faults)
        place = _place_of_row(k, row, base, faults, hides_source=sign is not None)
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            faults.broken.append(
                f"{CONFIG}: sorted_keys, {k}: {str(key)[:80]!r} is not the key of an intervention"
            )
        elif kind and place:
            places.append(_Place(key, kind, *place, sign))
    return places


def _recorded_kind(
    k: int, recorded: object, flags: ImportFlags, faults: _Faults
) -> tuple[Kind | None, float | None]:
    """An intervention's kind, and its sign if it is of a class that adds a vector."""
    name = (
        re.fullmatch(r"<class '([\w.<>]{1,256})'>", recorded) if isinstance(recorded, str) else None
    )
    if name is None:
        faults.broken.append(
            f"{CONFIG}: intervention_types, {k}: {str(recorded)[:80]!r} names no class"
        )
        return None, None
    last = name[1].rsplit(".", 1)[-1]
    sign = _VECTOR_CLASSES.get(last)
    if last not in _CLASSES and sign is None and flags.kind == "lobireft":
        sign = 1.0  # the user says what a class of his own does; its tensors must be one vector
    kind = "lobireft" if sign is not None else _CLASSES.get(last)
    if kind is None:
        served = ", ".join([*_CLASSES, *_VECTOR_CLASSES])
        faults.unsupported.append(
            f"intervention {k} is a {name[1]}; served are {served}. If all that it does is add "
            "one vector, give --kind lobireft"
        )
    elif flags.kind not in (None, kind):
        faults.broken.append(
            f"--kind {flags.kind} was given, but {CONFIG} records that intervention {k} is a {kind}"
        )
    return kind, sign


def _place_of_row(
    k: int, row: object, base: BaseFacts, faults: _Faults, *, hides_source: bool = False
) -> tuple[int, Component] | None:
    # pyvene before 0.1.3 had no latent_dim.
    if not isinstance(row, list) or len(row) not in (13, 14):
        faults.broken.append(f"{CONFIG}: representations, {k} is not a list of 13 or 14 entries")
        return None
    entry = dict(zip(FIELDS, row, strict=False))
    if entry["unit"] != "pos":
        faults.unsupported.append(
            f"intervention {k} acts on the unit {str(entry['unit'])[:40]!r}; only pos is supported"
        )
    if entry["max_number_of_units"] != 1:
        faults.unsupported.append(
            f"intervention {k} acts on several units at once (max_number_of_units is not 1)"
        )
    # Set by pyvene if the source lies in the intervention's own file, as an added vector does.
    refused = [
        name
        for name in _REFUSED_FIELDS
        if not (hides_source and name == "hidden_source_representation")
    ]
    faults.unsupported += [
        f"intervention {k} has a {name}" for name in refused if entry[name] is not None
    ]
    try:
        return resolve_component(str(entry["component"]), entry["layer"], base.architecture)
    except PlaceUnknown as exc:
        faults.unsupported.append(f"intervention {k}: {exc}")
    return None


def _checkpoint_places(
    source: Path, base: BaseFacts, flags: ImportFlags, faults: _Faults
) -> list[_Place]:
    if flags.kind is None:
        raise ImportFlagMissing(
            f"{source} has no {CONFIG}, as trainer checkpoints do not, so the kind of its "
            f"interventions is not recorded: give --kind, one of {', '.join(KINDS)}"
        )
    found: list[tuple[int, _Place]] = []
    for file in sorted(source.glob("intkey_*.bin")):
        key = file.name.removeprefix("intkey_").removesuffix(".bin")
        match = _KEY_PARTS.fullmatch(key)
        if match is None:
            faults.unsupported.append(
                f"{file.name[:120]!r} does not record its positions; save with ReftModel.save, "
                f"which writes {CONFIG}"
            )
            continue
        row = [int(match[1]), match[2], match[3], int(match[4]), *[None] * 10]
        place = _place_of_row(len(found), row, base, faults)
        if place:
            kind: Any = flags.kind
            found.append((int(match[5]), _Place(key, kind, *place)))
    if len(found) > _MAX_ROWS:
        faults.broken.append(f"it has {len(found)} interventions; at most {_MAX_ROWS} are taken")
    # The order of pyreft's recipes (`layers + layers`): every first intervention of a layer, then
    # every second one.
    return [
        place
        for _, place in sorted(found, key=lambda item: (item[0], item[1].layer, item[1].component))
    ]


def _parameters(path: Path, max_bytes: int, where: str) -> dict[str, Tensor]:
    """What was trained of the base model itself."""
    inner = path / CHECKPOINT
    file = (inner if inner.is_dir() else path) / EXTRA
    return read_torch(file, max_bytes, where) if file.exists() else {}


def _lora(
    path: Path, base: BaseFacts, flags: ImportFlags, max_bytes: int, faults: _Faults
) -> Lora | None:
    """The LoRA that was trained with the interventions: PEFT's files next to them, or pyreft's own
    save without its alpha.
    """
    layers = base.num_hidden_layers
    inner = path / CHECKPOINT
    source = inner if inner.is_dir() else path
    found = _parameters(path, max_bytes, faults.where)
    parameters = {name: tensor for name, tensor in found.items() if not is_head_parameter(name)}
    others = sorted(name for name in parameters if "lora_" not in name)
    if others:
        faults.unsupported.append(
            f"{EXTRA} holds trained weights of the base model itself "
            f"({', '.join(others[:3])[:200]}), and only interventions, a classifier head and a "
            "LoRA "
            "are supported"
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
    places: list[_Place], rule: PositionRule, faults: _Faults
) -> tuple[list[Part], list[str]]:
    half = len(places) // 2
    sites = [(place.layer, place.component) for place in places]
    for (layer, component), count in Counter(sites).items():
        if count > 2:
            faults.unsupported.append(
                f"it has {count} interventions at layer {layer} {component}, each for different "
                "tokens, which the save does not record: at one layer and component, edit all "
                "positions, or the prefix and the suffix separately"
            )
    if faults.unsupported:
        return ["both"] * len(places), []
    doubled = bool(half) and sites[:half] == sites[half:]
    if rule.tied:
        warning = (
            "its second half repeats the layers of its first, as pyreft saves untied f+l "
            "interventions: if it was trained without --share_weights, import it with --untied"
        )
        return ["both"] * len(places), [warning] if doubled else []
    if len(places) % 2:
        faults.broken.append(
            "--untied needs an even number of interventions, first those of the prefix, then "
            f"those of the suffix, and it has {len(places)}"
        )
    elif not doubled:
        faults.broken.append(
            "--untied needs the same layers twice, first for the prefix and then for the suffix, "
            "and its halves differ"
        )
    parts: list[Part] = ["prefix"] * half
    parts += ["suffix"] * (len(places) - half)
    return parts, []


def _read_tensors(source: Path, place: _Place, max_bytes: int, where: str) -> dict[str, Tensor]:
    saved = read_torch(source / place.file, max_bytes, where)
    sizes = [saved.pop(size, None) for size in ("embed_dim", "interchange_dim")]
    if (vector := _vector(saved, place)) is not None:
        return _shift(vector, place, sizes[1], where)
    R = rotation(saved, "rotate_layer.", False, place.file, where)
    if R is None and "rotate_layer" in saved:
        # LoReFT saves the final weight, (hidden, rank).
        R = saved.pop("rotate_layer")
        R = R.mT if R.ndim == 2 else R
    unknown = sorted(saved.keys() - _NAMES.keys())
    if unknown:
        raise AdapterInvalid(
            where, [f"{place.file} holds {unknown[0][:80]!r}, which no intervention of pyreft has"]
        )
    tensors = {_NAMES[name]: tensor for name, tensor in saved.items()}
    if len(tensors) < len(saved):
        raise AdapterInvalid(
            where, [f"{place.file} holds tensors of two layouts ({', '.join(sorted(saved))})"]
        )
    return tensors if R is None else {"R": R, **tensors}


def _vector(saved: dict[str, Tensor], place: _Place) -> Tensor | None:
    """The vector of an intervention that only adds it; None for a lobireft of pyreft's own."""
    if place.kind != "lobireft" or len(saved) != 1:
        return None
    name, tensor = next(iter(saved.items()))
    vector = tensor.flatten() if tensor.ndim and tensor.numel() == tensor.shape[-1] else tensor
    alone = name in _VECTOR_NAMES or (place.sign is not None and vector.ndim == 1)
    return vector if alone else None


def _shift(vector: Tensor, place: _Place, changed: Tensor | None, where: str) -> dict[str, Tensor]:
    """R and b of a lobireft of rank 1 that adds the vector: its direction, and its length with its
    sign.
    """
    fault = None
    if vector.ndim != 1 or not vector.is_floating_point() or not vector.isfinite().all():
        fault = (
            f"must hold one vector of finite floats, and holds {tuple(vector.shape)} of "
            f"{str(vector.dtype)[6:]}"
        )
    elif changed is not None and int(changed) != len(vector):
        fault = f"changes {int(changed)} of {len(vector)} dimensions only, which is not supported"
    elif not (length := vector.double().norm()):
        fault = "adds a vector of zeros, which has no effect"
    if fault is not None:
        raise AdapterInvalid(where, [f"{place.file} {fault}"])
    sign = 1.0 if place.sign is None else place.sign
    return {"R": (vector.double() / length)[None].float(), "b": (sign * length)[None].float()}


def _check_flags(
    places: list[_Place], tensors: list[dict[str, Tensor]], flags: ImportFlags, faults: _Faults
) -> None:
    if flags.activation and not any(has_activation(place.kind) for place in places):
        faults.broken.append(f"--activation was given, but a {places[0].kind} has none")
    if flags.no_bias:
        biased = [place.file for place, held in zip(places, tensors, strict=True) if "b2" in held]
        if biased:
            faults.broken.append(f"--no-bias was given, but {biased[0]} holds proj_layer.bias")
        elif not any(place.kind in ("noreft", "nodireft") for place in places):
            raise ClientError("--no-bias is for noreft and nodireft, which this save does not hold")
