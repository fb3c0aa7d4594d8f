"""What a run that continues from a version takes over from it: the structure, which cannot change
on the way. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_serve.adapters.manifest import InterventionSpec, Manifest
from reft_serve.adapters.structure import LORA_CONFIG, MAX_CONFIG_BYTES, check_structure
from reft_serve.errors import AdapterUnsupported
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import Kind
from reft_serve.storage.files import read_regular_file

__all__ = ["Structure", "structure_of"]

_MOST_TARGETS = 64


@dataclass(frozen=True, slots=True)
class Structure:
    """One kind, rank and activation at the outputs of some layers, a position rule, and perhaps a
    LoRA.

    Args:
        layers: in the order of the manifest. depth: layers of the base model.
        lora_targets: names of linear modules; None if the LoRA's configuration does not list them.
    """

    kind: Kind
    rank: int
    layers: tuple[int, ...]
    rule: PositionRule
    activation: str
    depth: int
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None

    def hyperparameters(self) -> dict[str, Any]:
        """The structure in the names and values of a job's hyper-parameters."""
        values: dict[str, Any] = {
            "kind": self.kind,
            "rank": self.rank,
            "layers": "all" if len(self.layers) == self.depth else sorted(self.layers),
            "positions": self.rule.spec,
            "tied": self.rule.tied,
            "activation": self.activation,
            "lora_rank": self.lora_rank,
        }
        if self.lora_rank:
            values["lora_alpha"] = self.lora_alpha
            if self.lora_targets is not None:
                values["lora_targets"] = list(self.lora_targets)
        return values

    def changes(self, asked: Mapping[str, Any]) -> dict[str, str]:
        """What `asked` would change, by name: a sentence each. Names that are not part of the
        structure are ignored.

        Args:
            asked: values in the form that `hyperparameters` returns.
        """
        own = self.hyperparameters()
        own.setdefault("lora_alpha", None)
        own.setdefault("lora_targets", None)
        changed = {
            name: (own[name], value)
            for name, value in asked.items()
            if name in own and self._plain(value) != self._plain(own[name])
        }
        return {
            name: f"{name} is {_shown(before)} in the model to continue from "
            f"and cannot become {_shown(after)}"
            for name, (before, after) in changed.items()
        }

    def _plain(self, value: Any) -> Any:
        """A value for comparison: lists without their order, all layers as a list."""
        value = range(self.depth) if value == "all" else value
        return sorted(value) if isinstance(value, list | tuple | range) else value


def structure_of(path: Path, where: str) -> Structure:
    """The structure of the version in the directory `path`; `where` is its name in messages.

    Raises:
        AdapterNotFound, AdapterInvalid: it cannot be read.
        AdapterUnsupported: a training run could not have made it, so none can continue from it.
    """
    manifest = check_structure(path, where)
    faults = list(_faults(manifest))
    if faults:
        raise AdapterUnsupported(where, faults)
    first = manifest.interventions[0]
    layers = tuple(dict.fromkeys(spec.layer for spec in manifest.interventions))
    return Structure(
        kind=first.kind,
        rank=first.rank,
        layers=layers,
        rule=manifest.positions,
        activation=first.activation,
        depth=manifest.base_model.num_hidden_layers,
        **_lora(path, where),
    )


def _faults(manifest: Manifest) -> Iterator[str]:
    specs = manifest.interventions
    for name in ("kind", "rank", "activation", "component"):
        values = sorted({str(getattr(spec, name)) for spec in specs})
        if len(values) > 1:
            yield f"its interventions differ in {name} ({', '.join(values[:4])})"
    if specs[0].component != "block_output":
        yield f"it edits {specs[0].component}, and only block_output is trained"
    if manifest.head is not None:
        yield "it has a classifier head, and only interventions and a LoRA can be continued"
    if manifest.positions.phase != "prompt":
        phase = manifest.positions.phase
        yield f"it edits tokens of phase {phase}, and training edits only prompt tokens"
    yield from _place_faults(specs, manifest.positions)


def _place_faults(specs: tuple[InterventionSpec, ...], rule: PositionRule) -> Iterator[str]:
    parts = ("both",) if rule.tied else ("prefix", "suffix")
    layers = {part: sorted(spec.layer for spec in specs if spec.part == part) for part in parts}
    if sum(len(at) for at in layers.values()) != len(specs):
        yield "its positions are untied, and an intervention serves both parts"
    elif any(at != layers[parts[0]] for at in layers.values()):
        yield "its prefix and its suffix are edited at different layers"
    elif any(len(set(at)) < len(at) for at in layers.values()):
        yield "it has two interventions at one place"


def _lora(path: Path, where: str) -> dict[str, Any]:
    if not (path / LORA_CONFIG).is_file():
        return {}
    config = json.loads(read_regular_file(path / LORA_CONFIG, MAX_CONFIG_BYTES, where))
    targets = config.get("target_modules")
    listed = isinstance(targets, list) and 0 < len(targets) <= _MOST_TARGETS
    return {
        "lora_rank": int(config["r"]),
        "lora_alpha": float(config["lora_alpha"]),
        "lora_targets": tuple(sorted(targets)) if listed else None,
    }


def _shown(value: Any) -> str:
    return ",".join(str(part) for part in value) if isinstance(value, list) else str(value)
