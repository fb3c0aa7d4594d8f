"""Shared code of the importers: facts that a save does not record, and safe reading of its
files.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from reft_serve.adapters.directory import DTYPES, check_tensors
from reft_serve.adapters.head import HEAD_PREFIX
from reft_serve.adapters.lora import Lora
from reft_serve.adapters.manifest import InterventionSpec, Manifest, Part, manifest_faults
from reft_serve.errors import AdapterInvalid, ClientError, ImportFlagMissing
from reft_serve.interventions.heads import Head
from reft_serve.interventions.kinds import Weights
from reft_serve.interventions.positions import Phase, PositionRule
from reft_serve.interventions.vocabulary import (
    ACTIVATION_CODES,
    KINDS,
    ORTHONORMAL,
    Component,
    Kind,
    ProblemType,
    has_activation,
    optional_tensors,
    required_tensors,
)
from reft_serve.storage.files import read_regular_file

__all__ = ["ImportFlags", "Imported", "Row", "assemble", "read_json", "read_torch", "rotation"]

_MAX_JSON_BYTES = 4 << 20
_ROTATION = "parametrizations.weight.original"
_BASE = "parametrizations.weight.0.base"


@dataclass(frozen=True, slots=True)
class ImportFlags:
    """Facts that a foreign save does not record: each is a flag of `reft-serve adapter import`.

    Raises:
        ClientError: a name that means nothing here.
    """

    positions: str | None = None
    untied: bool = False
    last_offset: int = 0
    activation: str | None = None
    no_bias: bool = False
    phase: str = "prompt"
    kind: str | None = None
    lora_alpha: float | None = None
    labels: str | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        for flag, value, known in (
            ("--kind", self.kind, KINDS),
            ("--activation", self.activation, tuple(ACTIVATION_CODES)),
            ("--phase", self.phase, get_args(Phase)),
            ("--problem-type", self.problem_type, get_args(ProblemType)),
        ):
            if value is not None and value not in known:
                raise ClientError(f"{flag} {value[:64]!r} is not one of {', '.join(known)}")
        if self.lora_alpha is not None and not math.isfinite(self.lora_alpha):
            raise ClientError(f"--lora-alpha {self.lora_alpha} is not a valid scale")

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of a classifier head's outputs, in their order."""
        return tuple(name.strip() for name in self.labels.split(",")) if self.labels else ()

    def rule(self) -> PositionRule:
        """The position rule.

        Raises:
            ImportFlagMissing: `--positions` was not given.
            PositionsInvalid: it says nothing sensible.
        """
        if self.positions is None:
            raise ImportFlagMissing(
                "this save does not record which tokens are edited: give --positions. pyreft's "
                "recipes: f7+l7 (paper, --share_weights), f5+l5 --untied (instruct), f1+l1, last "
                "(README); add --last-offset 1 for an adapter trained with ReftSupervisedDataset"
            )
        phase: Any = self.phase
        return PositionRule(
            self.positions, tied=not self.untied, last_offset=self.last_offset, phase=phase
        )


@dataclass(frozen=True, slots=True, eq=False)
class Imported:
    """An adapter as it will be published, and what its owner should know of it."""

    manifest: Manifest
    weights: tuple[Weights, ...]
    warnings: tuple[str, ...] = ()
    lora: Lora | None = None
    head: Head | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One intervention of a save: `tensors` named as in `vocabulary.required_tensors`, as they were
    saved.
    """

    layer: int
    component: Component
    kind: Kind
    tensors: dict[str, Tensor]
    origin: str
    activation: str | None = None
    part: Part = "both"


def assemble(
    rows: Sequence[Row],
    manifest: dict[str, object],
    where: str,
    warnings: Sequence[str],
    head: Head | None = None,
) -> Imported:
    """Make an adapter of a save's rows. `manifest` holds the manifest's other fields, of which
    `head` is said of the head.

    Raises:
        AdapterInvalid: every fault found.
    """
    faults = [f"{row.origin}: {fault}" for row in rows for fault in _row_faults(row)]
    if faults:
        raise AdapterInvalid(where, faults)
    kept = [
        {name: _kept(row.kind, name, tensor) for name, tensor in row.tensors.items()}
        for row in rows
    ]
    specs = tuple(_spec(row, tensors) for row, tensors in zip(rows, kept, strict=True))
    whole = Manifest.model_validate({**manifest, "interventions": specs})
    faults = manifest_faults(whole)
    if faults:
        raise AdapterInvalid(where, faults)
    named = {
        f"interventions.{k}.{name}": t
        for k, tensors in enumerate(kept)
        for name, t in tensors.items()
    }
    if head is not None:
        named |= {f"{HEAD_PREFIX}{name}": tensor for name, tensor in head.tensors().items()}
    weights, more_warnings = check_tensors(whole, named, where)
    return Imported(whole, weights, (*warnings, *more_warnings), head=head)


def _row_faults(row: Row) -> list[str]:
    required = required_tensors(row.kind)
    allowed = {*required, *optional_tensors(row.kind)}
    faults = [
        f"a {row.kind} needs {name}, which is missing"
        for name in required
        if name not in row.tensors
    ]
    faults += [
        f"a {row.kind} has no {name}, but the save holds one"
        for name in sorted(row.tensors.keys() - allowed)
    ]
    if faults:
        return faults
    faults = [
        f"{name} is {str(t.dtype)[6:]} and must be floats"
        for name, t in row.tensors.items()
        if not t.is_floating_point()
    ]
    if faults:
        return faults
    projection = row.tensors[required[0]]
    if projection.ndim != 2 or not len(projection):
        return [
            f"{required[0]} has shape {tuple(projection.shape)} and must be a matrix of rank by "
            "hidden size"
        ]
    trained = row.tensors.get("W", row.tensors["b"])
    if trained.dtype not in DTYPES.values():
        return [f"its tensors are {str(trained.dtype)[6:]} and must be one of {', '.join(DTYPES)}"]
    return []


def _kept(kind: Kind, name: str, tensor: Tensor) -> Tensor:
    full = name == "R" or (name == "b" and "W" not in required_tensors(kind))
    return tensor.to(torch.float32 if full else tensor.dtype, memory_format=torch.contiguous_format)


def _spec(row: Row, tensors: dict[str, Tensor]) -> InterventionSpec:
    trained = tensors.get("W", tensors["b"]).dtype
    return InterventionSpec(
        layer=row.layer,
        component=row.component,
        kind=row.kind,
        rank=len(tensors["R" if row.kind in ORTHONORMAL else "W2"]),
        activation=(row.activation or "linear") if has_activation(row.kind) else "linear",
        part=row.part,
        dtype=next(name for name, dtype in DTYPES.items() if dtype == trained),
    )


def read_json(file: Path, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        AdapterInvalid: the file is not a plain one, is too large, or holds something else.
    """
    try:
        data = json.loads(read_regular_file(file, _MAX_JSON_BYTES, where))
    except (ValueError, RecursionError) as exc:
        if isinstance(exc, AdapterInvalid):
            raise
        raise AdapterInvalid(where, [f"{file.name} is not JSON: {str(exc)[:200]}"]) from exc
    if not isinstance(data, dict):
        raise AdapterInvalid(where, [f"{file.name} is not a JSON object"])
    return data


def read_torch(file: Path, max_bytes: int, where: str) -> dict[str, Tensor]:
    """The tensors that `torch.save` wrote as a dictionary, without running what the pickle names.

    Raises:
        AdapterInvalid: not a regular file, too large (unpacked too), not a torch archive, or not
            named dense tensors.
    """
    content = read_regular_file(file, max_bytes, where)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as exc:
        raise AdapterInvalid(
            where, [f"{file.name} is damaged or was not written by torch.save"]
        ) from exc
    if unpacked > max_bytes:
        raise AdapterInvalid(
            where, [f"{file.name} unpacks to {unpacked} bytes and at most {max_bytes} are taken"]
        )
    try:
        data = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as exc:  # a hostile pickle can raise anything
        first = str(exc).split("\n", 1)[0][:200]
        raise AdapterInvalid(
            where, [f"{file.name} cannot be loaded as plain tensors ({first})"]
        ) from exc
    if not isinstance(data, dict) or not all(
        isinstance(k, str) and _is_plain(t) for k, t in data.items()
    ):
        raise AdapterInvalid(where, [f"{file.name} holds objects other than named, dense tensors"])
    return {name: tensor.detach() for name, tensor in data.items()}


def _is_plain(value: object) -> bool:
    # A view can claim more elements than its storage holds, which any copy of it would then
    # allocate.
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def rotation(
    saved: dict[str, Tensor], prefix: str, transposed: bool, origin: str, where: str
) -> Tensor | None:
    """R (rank, hidden) of a `torch.nn.utils.parametrizations.orthogonal` weight; None where the
    save has none.

    The weight is base @ Q(original), neither of the two alone. Q is a product of Householder
    reflections, or a matrix exponential where original is square
    (`torch/nn/utils/parametrizations.py`, `_Orthogonal.forward`).

    Args:
        saved: a state dict; the two tensors are popped.
        transposed: the weight itself is (rank, hidden), so original is too; else they are (hidden,
            rank).

    Raises:
        AdapterInvalid: one is missing or their shapes do not agree.
    """
    original = saved.pop(prefix + _ROTATION, None)
    base = saved.pop(prefix + _BASE, None)
    if original is None and base is None:
        return None
    if original is None or base is None:
        raise AdapterInvalid(
            where, [f"{origin}: {prefix}{_BASE if base is None else _ROTATION} is missing"]
        )
    X = original.mT if transposed and original.ndim == 2 else original
    if X.ndim != 2 or not 1 <= X.shape[1] <= X.shape[0] or base.shape != (X.shape[0], X.shape[0]):
        shapes = f"{tuple(original.shape)} and {tuple(base.shape)}"
        raise AdapterInvalid(
            where, [f"{origin}: the shapes of {prefix}original and base do not agree ({shapes})"]
        )
    if not (X.is_floating_point() and base.is_floating_point() and X.isfinite().all()):
        raise AdapterInvalid(where, [f"{origin}: {prefix}original must hold finite floats"])
    return (base.float() @ _orthogonal(X.float())).mT.contiguous()


def _orthogonal(X: Tensor) -> Tensor:
    if X.shape[0] == X.shape[1]:
        lower = X.tril()
        return torch.matrix_exp(lower - lower.mT)
    A = X.tril(diagonal=-1)
    Q = torch.linalg.householder_product(A, 2.0 / (1.0 + (A * A).sum(dim=-2)))
    # torch truncates the signs to integers, so a diagonal that weight decay moved off -1 gives a
    # zero column there too.
    signed: Tensor = Q * X.diagonal().int()
    return signed
