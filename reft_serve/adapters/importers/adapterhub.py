"""ReFT adapters saved by AdapterHub's `adapters` library (`model.save_adapter`).

Layout: `adapter_config.json` whose `config.architecture` is "reft", and `pytorch_adapter.bin` or
`adapter.safetensors` (`src/adapters/methods/reft.py`, `loading.py`). A unit is
`...<layer>.reft_layer.refts.<name>.units.<u>.` with `learned_source` (W, b) and `projection` (R or
W2, parametrised where orthogonal); untied, unit 0 is the prefix's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
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
from reft_serve.adapters.manifest import BaseFacts, Part
from reft_serve.adapters.tensors import parse_tensors
from reft_serve.errors import AdapterInvalid, AdapterUnsupported, ClientError, ImportFlagMissing
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import ACTIVATION_CODES, SUBTRACTS, Kind
from reft_serve.storage.files import read_regular_file

__all__ = ["is_adapterhub", "read_adapterhub"]

CONFIG = "adapter_config.json"
_PICKLE = "pytorch_adapter.bin"
_SAFETENSORS = "adapter.safetensors"
_HEAD = "head_config.json"
_UNIT = re.compile(
    r"(?:^|.*\.)(?:layers|layer|h)\.(\d{1,5})\.reft_layer\.refts\.([^.]+)\.units\.([01])\.(.+)"
)
_PROJECTION = "projection.weight"
_COUNTED = (
    "AdapterHub counts positions over the whole sequence, in training including the answer, and "
    "edits generated tokens differently or not at all; here they are counted over the prompt"
)


class _Config(BaseModel):
    """The fields of AdapterHub's `ReftConfig` that change what an adapter computes."""

    model_config = ConfigDict(strict=True, extra="ignore")

    layers: Literal["all"] | list[int]
    prefix_positions: Annotated[int, Field(ge=0, le=4096)]
    suffix_positions: Annotated[int, Field(ge=0, le=4096)]
    orthogonality: bool
    tied_weights: bool
    # A class attribute of the library's configurations and not a field, so no release has recorded
    # it.
    subtract_projection: bool | None = None
    non_linearity: str | None = None
    output_reft: bool = True


@dataclass(frozen=True, slots=True)
class _Unit:
    layer: int
    number: int
    tensors: dict[str, Tensor]


def is_adapterhub(path: Path) -> bool:
    """True if the directory holds an AdapterHub (or PEFT) configuration; both use the same file
    name.
    """
    return (path / CONFIG).is_file()


def read_adapterhub(
    path: Path, base: BaseFacts, flags: ImportFlags, max_bytes: int = 1 << 30
) -> Imported:
    """Import a ReFT adapter of AdapterHub.

    Args:
        path: the directory that `save_adapter` wrote.
        base: the base model that it was trained on.
        flags: `kind` if it is not recorded, and `phase`; positions and activation are recorded.
        max_bytes: largest file to take into memory.

    Raises:
        ImportFlagMissing: `--kind` is needed: whether the projection is subtracted is not recorded.
        AdapterUnsupported: it is another kind of adapter, or has a prediction head.
        AdapterInvalid: it is damaged, or a flag contradicts it.
    """
    where = str(path)
    saved = read_json(path / CONFIG, where)
    config = _config(saved, where)
    _check_head(path, where)
    kind = _kind(config, flags, where)
    activation = _activation(config, flags, where)
    rule, by_unit, warnings = _positions(config, flags, where)
    units = _units(_read_weights(path, max_bytes, where), config, where)
    rows = [
        Row(
            unit.layer,
            "block_output",
            kind,
            unit.tensors,
            f"layer {unit.layer}",
            activation,
            by_unit[unit.number],
        )
        for unit in units
        if unit.number in by_unit
    ]
    others = {"base_model": base, "positions": rule, "provenance": {"format": "adapterhub"}}
    return assemble(rows, others, where, warnings)


def _config(saved: dict[str, Any], where: str) -> _Config:
    inner = saved.get("config")
    if "peft_type" in saved or not isinstance(inner, dict):
        raise AdapterUnsupported(
            where, [f"{CONFIG} is not of AdapterHub's ReFT; a PEFT LoRA needs no import"]
        )
    if inner.get("architecture") != "reft":
        name = str(inner.get("architecture"))[:40]
        raise AdapterUnsupported(
            where, [f"its architecture is {name!r}; only AdapterHub's 'reft' is imported"]
        )
    try:
        return _Config.model_validate(inner)
    except ValidationError as exc:
        wrong = [f"{CONFIG}, config.{error['loc'][0]}: {error['msg']}" for error in exc.errors()]
        raise AdapterInvalid(where, wrong) from exc


def _check_head(path: Path, where: str) -> None:
    if not (path / _HEAD).is_file():
        return
    head = read_json(path / _HEAD, where).get("config")
    head_type = head.get("head_type") if isinstance(head, dict) else None
    if head_type not in (None, "causal_lm"):
        raise AdapterUnsupported(
            where, [f"it has a {str(head_type)[:40]} prediction head, and only ReFT is served"]
        )


def _kind(config: _Config, flags: ImportFlags, where: str) -> Kind:
    subtracts = config.subtract_projection
    kinds: tuple[Kind, Kind] = (
        ("loreft", "direft") if config.orthogonality else ("noreft", "nodireft")
    )
    if flags.kind is not None:
        kind = next((known for known in kinds if known == flags.kind), None)
        if kind is None or subtracts not in (None, kind in SUBTRACTS):
            raise AdapterInvalid(where, [f"--kind {flags.kind} contradicts {CONFIG}"])
        return kind
    if subtracts is None and not config.orthogonality:
        raise ImportFlagMissing(
            f"{CONFIG} does not record whether the projection is subtracted: give --kind noreft "
            "(AdapterHub's NoReftConfig) or --kind nodireft (its DiReftConfig)"
        )
    return kinds[1] if subtracts is False else kinds[0]


def _activation(config: _Config, flags: ImportFlags, where: str) -> str:
    recorded = (config.non_linearity or "linear").lower()
    name = "leaky_relu" if recorded == "leakyrelu" else recorded
    if name not in ACTIVATION_CODES:
        raise AdapterUnsupported(where, [f"its non-linearity {name[:64]!r} is not supported"])
    if flags.activation not in (None, name):
        raise AdapterInvalid(
            where, [f"--activation {flags.activation} was given, but {CONFIG} records {name}"]
        )
    return name


def _positions(
    config: _Config, flags: ImportFlags, where: str
) -> tuple[PositionRule, dict[int, Part], tuple[str, ...]]:
    """The rule, which part each unit serves (a unit that is left out edits nothing), and
    warnings.
    """
    if flags.positions is not None or flags.untied or flags.last_offset or flags.no_bias:
        raise ClientError(
            f"{CONFIG} of AdapterHub records the positions: leave out the flags that say them again"
        )
    first = config.prefix_positions
    last = config.suffix_positions
    if not first and not last:
        raise AdapterInvalid(
            where, ["it edits nothing: prefix_positions and suffix_positions are 0"]
        )
    phase: Any = flags.phase
    if first and last and not config.tied_weights:
        rule = PositionRule(f"f{first}+l{last}", tied=False, phase=phase)
        short = (
            f"in prompts of fewer than {2 * max(first, last)} tokens fewer tokens are edited than "
            "AdapterHub would"
        )
        return rule, {0: "prefix", 1: "suffix"}, (_COUNTED, short)
    # Written as indices, because AdapterHub has no half rule; a token in both is edited once there
    # too.
    indices = [*range(first), *range(-last, 0)]
    rule = PositionRule(",".join(map(str, indices)), phase=phase)
    unit = 0 if config.tied_weights or first else 1
    return rule, {unit: "both"}, (_COUNTED,)


def _read_weights(path: Path, max_bytes: int, where: str) -> dict[str, Tensor]:
    if (path / _SAFETENSORS).exists():
        return parse_tensors(
            read_regular_file(path / _SAFETENSORS, max_bytes, where), _SAFETENSORS, where
        )
    return read_torch(path / _PICKLE, max_bytes, where)


def _units(saved: dict[str, Tensor], config: _Config, where: str) -> list[_Unit]:
    units: dict[tuple[int, int], dict[str, Tensor]] = {}
    stray = []
    names = set()
    for key, tensor in saved.items():
        match = _UNIT.fullmatch(key)
        if match is None:
            stray.append(key)
            continue
        names.add(match[2])
        units.setdefault((int(match[1]), int(match[3])), {})[match[4]] = tensor
    faults = [
        f"it holds {key[:120]!r}, which is not a part of a ReFT unit" for key in sorted(stray)[:8]
    ]
    if len(names) > 1:
        faults.append(
            f"it holds several adapters ({', '.join(sorted(names))[:120]}); save one at a time"
        )
    layers = sorted({layer for layer, _ in units})
    if config.layers != "all" and layers != sorted(set(config.layers)):
        faults.append(
            f"{CONFIG} names layers {sorted(set(config.layers))} and the weights are of layers "
            f"{layers}"
        )
    expected = {0} if config.tied_weights else {0, 1}
    faults += [
        f"layer {layer} needs {len(expected)} units (tied_weights is {config.tied_weights})"
        for layer in layers
        if {number for at, number in units if at == layer} != expected
    ]
    if not units:
        faults.append("it holds no ReFT unit")
    if faults:
        raise AdapterInvalid(where, faults)
    return [
        _Unit(layer, number, _tensors(units[layer, number], config, layer, where))
        for layer, number in sorted(units)
    ]


def _tensors(
    saved: dict[str, Tensor], config: _Config, layer: int, where: str
) -> dict[str, Tensor]:
    projection = rotation(saved, "projection.", True, f"layer {layer}", where)
    if projection is None:
        projection = saved.pop(_PROJECTION, None)
    elif not config.orthogonality:
        raise AdapterInvalid(
            where, [f"layer {layer}: orthogonality is false, but the projection is parametrised"]
        )
    named = {"R" if config.orthogonality else "W2": projection}
    named |= {
        "W": saved.pop("learned_source.weight", None),
        "b": saved.pop("learned_source.bias", None),
    }
    if saved:
        raise AdapterInvalid(
            where, [f"layer {layer} holds {min(saved)[:80]!r}, which no ReFT unit has"]
        )
    return {name: tensor for name, tensor in named.items() if tensor is not None}
