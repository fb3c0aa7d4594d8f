"""`reft_config.json`: what an adapter is, without its tensors. No torch, so that the gateway can
read it.

The facts of the base model are those that must match for the edits to mean anything; its name is
for people.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from reft_serve.adapters.head import HeadSpec
from reft_serve.errors import MAX_ADAPTER_FAULTS, AdapterInvalid
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import (
    ACTIVATION_CODES,
    LINEAR,
    MAX_LABELS,
    Component,
    Kind,
    has_activation,
    unit_rank,
)

__all__ = [
    "MAX_INTERVENTIONS",
    "MAX_KEYS",
    "MAX_PROVENANCE",
    "BaseFacts",
    "DType",
    "EngineLimits",
    "InterventionSpec",
    "Manifest",
    "Part",
    "manifest_faults",
    "parse_manifest",
]

MAX_PASSES = 4
MAX_INTERVENTIONS = 8192
# Entries of one object, and of `provenance`.
MAX_KEYS = 32
MAX_PROVENANCE = 128
_MOST_ERRORS = 1000
_SUMMARY_LABELS = 32
Part = Literal["both", "prefix", "suffix"]
DType = Literal["float32", "bfloat16", "float16"]
_Count = Annotated[int, Field(ge=1, le=1 << 24)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class BaseFacts(_Frozen):
    """The base model that an adapter was trained on, or that an engine runs."""

    name: Annotated[str, Field(max_length=1024)]
    architecture: Annotated[str, Field(min_length=1, max_length=256)]
    hidden_size: _Count
    num_hidden_layers: _Count


class InterventionSpec(_Frozen):
    """One edit: its layer and component, its kind, and its half of an untied position rule."""

    layer: Annotated[int, Field(ge=0, le=1 << 16)]
    component: Component
    kind: Kind
    rank: _Count
    activation: str = "linear"
    part: Part = "both"
    unit: Literal["pos"] = "pos"
    dtype: DType = "float32"

    @field_validator("activation")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ACTIVATION_CODES:
            raise ValueError(
                f"activation {name[:64]!r} is not one of {', '.join(ACTIVATION_CODES)}"
            )
        return name

    @model_validator(mode="after")
    def _applied(self) -> InterventionSpec:
        if not has_activation(self.kind) and ACTIVATION_CODES[self.activation] != LINEAR:
            raise ValueError(f"{self.kind} has no activation, but {self.activation!r} is recorded")
        return self

    @property
    def unit_rank(self) -> int:
        """Rows that it takes in the engine's pool."""
        return unit_rank(self.kind, self.rank, self.activation)

    @property
    def where(self) -> str:
        """Its place, for messages."""
        half = "" if self.part == "both" else f" ({self.part})"
        return f"layer {self.layer} {self.component}{half}"


class Manifest(_Frozen):
    """The whole of `reft_config.json`. The order of interventions is the order in which they act at
    one place.
    """

    format_version: Literal[1] = 1
    base_model: BaseFacts
    interventions: Annotated[
        tuple[InterventionSpec, ...],
        Field(min_length=1, max_length=MAX_INTERVENTIONS, strict=False),
    ]
    positions: PositionRule
    head: HeadSpec | None = None
    provenance: dict[str, str | int | float | bool | None] = {}

    @model_validator(mode="after")
    def _halves(self) -> Manifest:
        for k, spec in enumerate(self.interventions):
            if self.positions.tied and spec.part != "both":
                raise ValueError(
                    f"intervention {k} serves the {spec.part} only, but the positions are tied"
                )
        return self

    def summary(self) -> dict[str, str | int | list[str]]:
        """A short description for people."""
        facts: dict[str, str | int | list[str]] = {
            "kinds": sorted({spec.kind for spec in self.interventions}),
            "interventions": len(self.interventions),
            "rank": max(spec.rank for spec in self.interventions),
            "positions": self.positions.spec,
        }
        if self.head is not None:
            facts |= {"task": self.head.task, "labels": list(self.head.labels[:_SUMMARY_LABELS])}
        return facts

    def to_json(self) -> str:
        """The text of the file: the same for equal manifests."""
        fields = self.model_dump(mode="json")
        if self.head is None:  # as it was before there were heads, so that the digest is too
            del fields["head"]
        return json.dumps(fields, indent=2) + "\n"


class EngineLimits(_Frozen):
    """Limits of an engine, with the manifest's component names; None for a limit that is not
    declared.
    """

    max_rank: int | None = None
    max_interventions: int | None = None
    components: frozenset[Component] | None = None

    def faults(self, manifest: Manifest, base: BaseFacts) -> list[str]:
        """Why this engine, running `base`, cannot serve the adapter; empty if it can."""
        return _base_faults(manifest, base) + self._limit_faults(manifest)

    def _limit_faults(self, manifest: Manifest) -> list[str]:
        specs = manifest.interventions
        faults = []
        if self.max_interventions is not None and len(specs) > self.max_interventions:
            faults.append(
                f"it has {len(specs)} interventions and this engine supports "
                f"{self.max_interventions}: raise REFT_MAX_INTERVENTIONS"
            )
        for k, spec in enumerate(specs):
            if self.max_rank is not None and spec.unit_rank > self.max_rank:
                twice = (
                    f" (twice its rank, for the activation {spec.activation})"
                    if spec.unit_rank > spec.rank
                    else ""
                )
                faults.append(
                    f"intervention {k} ({spec.where}) needs rank {spec.unit_rank}{twice} and this "
                    f"engine supports {self.max_rank}: raise REFT_MAX_RANK"
                )
            if self.components is not None and spec.component not in self.components:
                faults.append(
                    f"intervention {k} edits {spec.component}, which this engine was started "
                    "without: add it to REFT_COMPONENTS"
                )
        return faults


def _base_faults(manifest: Manifest, base: BaseFacts) -> list[str]:
    theirs = manifest.base_model
    faults = []
    if theirs.architecture != base.architecture:
        faults.append(
            f"it was trained on a {theirs.architecture} and the base model is a {base.architecture}"
        )
    if theirs.hidden_size != base.hidden_size:
        faults.append(
            f"its hidden size is {theirs.hidden_size} and the base model's is {base.hidden_size}"
        )
    if theirs.num_hidden_layers != base.num_hidden_layers:
        faults.append(
            f"it was trained on {theirs.num_hidden_layers} layers and the base model has "
            f"{base.num_hidden_layers}"
        )
    return faults


def manifest_faults(manifest: Manifest) -> list[str]:
    """Faults that a well-formed manifest has in itself: layers out of range, more edits at one
    place than we compose.
    """
    layers = manifest.base_model.num_hidden_layers
    faults = [
        f"intervention {k} is at layer {spec.layer} and the base model has {layers} (0 to "
        f"{layers - 1})"
        for k, spec in enumerate(manifest.interventions)
        if spec.layer >= layers
    ]
    depth: Counter[tuple[int, str, str]] = Counter()
    for spec in manifest.interventions:
        for half in ("prefix", "suffix") if spec.part == "both" else (spec.part,):
            depth[(*place_of(spec), half)] += 1
    for (boundary, place, half), count in depth.items():
        if count > MAX_PASSES:
            faults.append(
                f"{count} interventions act in sequence at {place} {boundary} ({half}); at most "
                f"{MAX_PASSES} are supported"
            )
    return faults


def place_of(spec: InterventionSpec) -> tuple[int, str]:
    """Where an edit acts: the stream that leaves layer k is the one that enters layer k + 1, so
    both have one name.

    Returns (layer, "mlp_output" | "attention_output") or (boundary, "block"), boundary 0 being the
    embeddings.
    """
    if spec.component == "block_output":
        return spec.layer + 1, "block"
    if spec.component == "block_input":
        return spec.layer, "block"
    return spec.layer, spec.component


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Read `reft_config.json`.

    Raises:
        AdapterInvalid: every fault of the text, each with its place in the JSON.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        data = json.loads(text, parse_constant=refuse)
        strict = json.dumps(data)
    except (ValueError, RecursionError) as exc:
        raise AdapterInvalid(where, [f"reft_config.json is not JSON: {str(exc)[:200]}"]) from exc
    faults = _size_faults(data)
    if faults:
        raise AdapterInvalid(where, faults)
    try:
        manifest = Manifest.model_validate_json(strict)
    except ValidationError as exc:
        raise AdapterInvalid(where, _error_faults(exc, data)) from exc
    faults = manifest_faults(manifest)
    if faults:
        raise AdapterInvalid(where, faults)
    return manifest


def _size_faults(data: Any) -> list[str]:
    """Reject objects with too many entries before validation: each entry could be a fault, and each
    fault takes memory.
    """
    if not isinstance(data, dict):
        return []
    sizes = [
        ("the top level", data, MAX_KEYS),
        ("provenance", data.get("provenance"), MAX_PROVENANCE),
    ]
    sizes += [(name, data.get(name), MAX_KEYS) for name in ("base_model", "positions", "head")]
    if isinstance(data.get("head"), dict):
        sizes.append(("head.labels", data["head"].get("labels"), MAX_LABELS))
    specs = data.get("interventions")
    if isinstance(specs, list):
        sizes.append(("interventions", specs, MAX_INTERVENTIONS))
        sizes += [
            (f"interventions.{k}", spec, MAX_KEYS)
            for k, spec in enumerate(specs[:MAX_INTERVENTIONS])
        ]
    return [
        f"reft_config.json, {place}: it has {len(held):,} entries and at most {most:,} are taken"
        for place, held, most in sizes
        if isinstance(held, dict | list) and len(held) > most
    ]


def _error_faults(error: ValidationError, data: Any) -> list[str]:
    """Pydantic's errors as faults; of very many only the first, because each takes memory."""
    count = error.error_count()
    if count <= _MOST_ERRORS:
        return [_sentence(dict(each)) for each in error.errors(include_url=False)]
    faults: list[str] = []
    for k, spec in enumerate(data["interventions"]):  # nothing else in a manifest can have so many
        try:
            InterventionSpec.model_validate(spec)
        except ValidationError as exc:
            for each in exc.errors(include_url=False):
                faults.append(_sentence({**each, "loc": ("interventions", k, *each["loc"])}))
        if len(faults) >= MAX_ADAPTER_FAULTS:
            break
    return [*faults[:MAX_ADAPTER_FAULTS], f"and {max(count - MAX_ADAPTER_FAULTS, 1):,} more faults"]


def _sentence(error: dict[str, Any]) -> str:
    place = ".".join(repr(part)[:64].strip("'") for part in error["loc"]) or "the top level"
    value = error.get("input")
    short = value is None or (isinstance(value, str | int | float) and len(repr(value)) <= 60)
    suffix = (
        f", not {value!r}"
        if short and error["type"] not in ("missing", "value_error", "model_type")
        else ""
    )
    return f"reft_config.json, {place}: {error['msg'].removeprefix('Value error, ')}{suffix}"
