"""Writing an adapter as `ReftModel.save` of pyreft 0.1.0 with pyvene 0.1.8 would, for pyreft to
load.
"""

from __future__ import annotations

import io
import json
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from reft_serve.adapters.directory import Adapter
from reft_serve.adapters.importers.pyreft_sites import CONFIG, FIELDS
from reft_serve.adapters.manifest import InterventionSpec
from reft_serve.errors import AdapterUnsupported
from reft_serve.interventions.kinds import Weights
from reft_serve.interventions.vocabulary import has_activation
from reft_serve.storage.files import write_directory

__all__ = ["export_pyreft", "import_flags"]


def export_pyreft(adapter: Adapter, out: Path) -> None:
    """Write the directory `out`: `config.json` and one `intkey_*.bin` for each intervention, whole
    or not at all.

    The parametrised layouts get `original` = -I and a `base` whose first columns are R transposed,
    so that torch's product gives R exactly, orthonormal or not; the other columns complete it.

    Raises:
        AdapterExists: something is at `out` already.
        AdapterUnsupported: its prefix and suffix have different interventions, which pyreft cannot
            distinguish.
    """
    if adapter.head is not None:
        raise AdapterUnsupported(
            "being exported",
            ["its classifier head would be lost: pyreft keeps it in the base model"],
        )
    rows = list(_rows(adapter))
    keys = _keys([spec for spec, _ in rows])
    # PEFT's files, as its users load them
    lora = {} if adapter.lora is None else adapter.lora.files
    write_directory(
        out, [*_files(rows, keys, adapter.manifest.base_model.hidden_size), *lora.items()]
    )


def import_flags(adapter: Adapter) -> str:
    """What to say to `adapter import` when the export comes back: pyreft's directory does not hold
    it.
    """
    rule = adapter.manifest.positions
    said = [f"--positions={rule.spec}"]
    said += ["--untied"] if not rule.tied else []
    said += [f"--last-offset {rule.last_offset}"] if rule.last_offset else []
    said += [f"--phase {rule.phase}"] if rule.phase != "prompt" else []
    names = {
        spec.activation for spec in adapter.manifest.interventions if has_activation(spec.kind)
    }
    said += [f"--activation {name}" for name in sorted(names - {"linear"})]
    return " ".join(said)


def _rows(adapter: Adapter) -> Iterator[tuple[InterventionSpec, Weights]]:
    """In pyreft's order: untied, all of the prefix and then all of the suffix."""
    rows = list(zip(adapter.manifest.interventions, adapter.weights, strict=True))
    if adapter.manifest.positions.tied:
        yield from rows
        return
    halves = [
        [row for row in rows if row[0].part in ("both", half)] for half in ("prefix", "suffix")
    ]
    places = [[(spec.layer, spec.component) for spec, _ in half] for half in halves]
    if places[0] != places[1]:
        raise AdapterUnsupported(
            "being exported",
            [
                "pyreft needs the same layers for the prefix and for the suffix, in the same "
                "order, and here they differ"
            ],
        )
    for half in halves:
        yield from half


def _keys(specs: list[InterventionSpec]) -> list[str]:
    seen: Counter[tuple[int, str]] = Counter()
    keys = []
    for spec in specs:
        place = (spec.layer, spec.component)
        keys.append(f"layer_{spec.layer}_comp_{spec.component}_unit_pos_nunit_1#{seen[place]}")
        seen[place] += 1
    return keys


def _files(
    rows: list[tuple[InterventionSpec, Weights]], keys: list[str], width: int
) -> Iterator[tuple[str, bytes]]:
    config = {
        "intervention_constant_sources": [True] * len(rows),
        "intervention_dimensions": [width] * len(rows),
        "intervention_types": [
            f"<class 'pyreft.interventions.{s.kind.capitalize()}Intervention'>" for s, _ in rows
        ],
        "mode": "parallel",
        "representations": [
            [spec.layer, spec.component, "pos", 1, spec.rank, *[None] * (len(FIELDS) - 5)]
            for spec, _ in rows
        ],
        "sorted_keys": keys,
    }
    yield CONFIG, json.dumps(config, indent=2).encode() + b"\n"
    for key, (_, weights) in zip(keys, rows, strict=True):
        content = io.BytesIO()
        torch.save(_state_dict(weights), content)
        yield f"intkey_{key}.bin", content.getvalue()


def _state_dict(weights: Weights) -> OrderedDict[str, Tensor]:
    held = weights.tensors()
    rank, width = weights.projection.shape
    if weights.kind == "loreft":
        return OrderedDict(weight=held["W"], bias=held["b"], rotate_layer=held["R"].mT.contiguous())
    saved = OrderedDict(embed_dim=torch.tensor(width), interchange_dim=torch.tensor(rank))
    if "R" in held:
        saved["rotate_layer.parametrizations.weight.original"] = -torch.eye(width, rank)
        saved["rotate_layer.parametrizations.weight.0.base"] = _completed(held["R"])
    else:
        saved["proj_layer.weight"] = held["W2"]
        if "b2" in held:
            saved["proj_layer.bias"] = held["b2"]
    if "W" in held:
        saved["learned_source.weight"] = held["W"]
        saved["learned_source.bias"] = held["b"]
    else:
        saved["learned_source"] = held["b"]
    return saved


def _completed(R: Tensor) -> Tensor:
    """(hidden, hidden) with R transposed as its first columns and an orthonormal basis of the
    rest.
    """
    basis, _ = torch.linalg.qr(R.double().mT, mode="complete")
    return torch.cat([R.mT, basis[:, len(R) :].float()], dim=1).contiguous()
