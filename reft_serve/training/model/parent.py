"""The version that a run continues from: its weights and, from a checkpoint of an equal run, its
optimiser's state.

A version (an adapter's directory, the `adapter/` of a run) holds only weights. A checkpoint also
holds the state of the optimiser, the schedule and the random generators. That state is used if
everything except the length of the run is equal and the schedule is constant: then two runs of 25
steps are one run of 50. A schedule that falls has come to zero, so a new one begins, with a new
optimiser.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from reft_serve.adapters.directory import Adapter, read_adapter
from reft_serve.adapters.inheritance import Structure, structure_of
from reft_serve.adapters.manifest import BaseFacts, EngineLimits
from reft_serve.errors import AdapterUnsupported, ClientError
from reft_serve.interventions.kinds import Weights
from reft_serve.interventions.modules import Intervention
from reft_serve.interventions.positions import Part
from reft_serve.training.model.edited_model import Edit
from reft_serve.training.plan import LoraPlan, Plan

__all__ = ["Parent", "data_lineage", "read_parent"]

_STATE = (
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
    "parameters.safetensors",
    "complete",
)
# What may differ between two runs that are one: their length, and what changes no number.
_FREE = (
    "epochs",
    "max_steps",
    "save_every",
    "keep",
    "keep_states",
    "report_to",
    "compile",
    "gradient_checkpointing",
)


@dataclass(frozen=True, slots=True)
class Parent:
    """A version to continue from.

    Args:
        path: its directory.
        name: what it is called in the lineage of what is made.
        run: the record (`run.json`) of the run that it is a checkpoint of; None for a version
            without training state.
        step, epochs: how far that run had come; 0 for a version.
    """

    path: Path
    name: str
    adapter: Adapter
    structure: Structure
    run: Mapping[str, Any] | None = None
    step: int = 0
    epochs: float = 0.0

    def plan(self, plan: Plan) -> Plan:
        """`plan` with the structure of this version."""
        own = self.structure
        shape = replace(
            plan.adapter,
            kind=own.kind,
            rank=own.rank,
            layers=own.layers,
            rule=own.rule,
            activation=own.activation,
        )
        lora = None
        if own.lora_rank:
            dropout = plan.lora.dropout if plan.lora is not None else 0.0
            lora = LoraPlan(own.lora_rank, own.lora_alpha or 0.0, dropout, own.lora_targets)
        return replace(plan, adapter=shape, lora=lora)

    def check(self, asked: Mapping[str, Any], base: BaseFacts) -> None:
        """Refuse a change of the structure, and another base model.

        Args:
            asked: parts of the structure that the user gave, as `Structure.hyperparameters` names
                them.
            base: the model to train on.

        Raises:
            ClientError: names every change.
            AdapterUnsupported: it was trained on another base.
        """
        faults = EngineLimits().faults(self.adapter.manifest, base)
        if faults:
            raise AdapterUnsupported(self.name, faults)
        changes = self.structure.changes(asked)
        if changes:
            raise ClientError("; ".join(changes.values()))

    def fresh_because(
        self, plan: Plan, recorded: Mapping[str, Any], data: Sequence[str]
    ) -> str | None:
        """Why the optimiser has to start anew; None if its state is used.

        Args:
            plan: of the new run.
            recorded: the same plan as `run.json` records one.
            data: the digest of the examples, and the fingerprint of the data if there is one.
        """
        if self.run is None:
            return "a version holds weights and no training state"
        if plan.schedule != "constant":
            return f"a {plan.schedule} schedule starts again"
        before: Mapping[str, Any] = self.run.get("plan") or {}
        differing = [
            name
            for name, value in recorded.items()
            if name not in _FREE and _own(name, before.get(name)) != _own(name, value)
        ]
        if differing:
            return f"{', '.join(differing)} differ from the checkpoint's run"
        known = {self.run.get("data"), *(self.run.get("fingerprints") or ())[:1]}
        if known.isdisjoint(data):
            return "the data differ from the checkpoint's run"
        return None

    def extended(self, plan: Plan) -> Plan:
        """`plan` with the length of this checkpoint's run and its own together."""
        steps = None if plan.max_steps is None else self.step + plan.max_steps
        return replace(plan, epochs=self.epochs + plan.epochs, max_steps=steps)

    def edits(self, dropout: float) -> list[Edit]:
        """Its interventions, to be trained on. Their bits are kept.

        Raises:
            AdapterInvalid: R is not orthonormal, so it cannot be trained.
        """
        by_place: dict[tuple[int, str], Weights] = {
            (spec.layer, spec.part): weights
            for spec, weights in zip(
                self.adapter.manifest.interventions, self.adapter.weights, strict=True
            )
        }
        parts = (
            {Part.PREFIX: "both"}
            if self.structure.rule.tied
            else {Part.PREFIX: "prefix", Part.SUFFIX: "suffix"}
        )
        return [
            Edit(layer, part, Intervention.of(_float(by_place[layer, name]), dropout))
            for part, name in parts.items()
            for layer in self.structure.layers
        ]

    def lineage(self) -> dict[str, str | int]:
        """What the versions that come of it record."""
        lineage: dict[str, str | int] = {"parent": self.name, "parent_sha256": self.adapter.digest}
        return lineage | ({"parent_step": self.step} if self.step else {})


def read_parent(path: Path, name: str | None = None) -> Parent:
    """The version in a directory: an adapter, a checkpoint of a run, or a run, whose `adapter/` is
    meant.

    Raises:
        AdapterNotFound, AdapterInvalid: it cannot be read.
        AdapterUnsupported: no run can continue from it.
    """
    if (path / "run.json").is_file() and (path / "adapter").is_dir():
        path = path / "adapter"
    known = name or path.resolve().name
    adapter, structure = read_adapter(path), structure_of(path, known)
    record = path.resolve().parent.parent / "run.json"
    if not record.is_file() or not all((path / each).is_file() for each in _STATE):
        return Parent(path, known, adapter, structure)
    state = json.loads((path / "trainer_state.json").read_text())
    run = json.loads(record.read_text())
    return Parent(
        path, known, adapter, structure, run, int(state["global_step"]), float(state["epoch"] or 0)
    )


def data_lineage(data: Path, held_out: Path | None) -> dict[str, str | int]:
    """Digests of the data files, for the record of a version."""
    digests: dict[str, str | int] = {}
    for name, path in (("data_sha256", data), ("held_out_sha256", held_out)):
        if path is not None:
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _own(name: str, value: Any) -> Any:
    """A recorded setting without the structure, which is taken over however it was written."""
    return (value or {}).get("dropout") if name in ("adapter", "lora") else value


def _float(weights: Weights) -> Weights:
    tensors = {name: tensor.to(torch.float32) for name, tensor in weights.tensors().items()}
    return Weights.of(weights.kind, tensors, weights.activation)
