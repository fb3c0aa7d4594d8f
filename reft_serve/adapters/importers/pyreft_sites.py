"""Where the interventions of a pyreft save act: read from its configuration, or from the names of a
trainer checkpoint's files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reft_serve.adapters.importers.common import (
    ImportFlags,
)
from reft_serve.adapters.importers.components import ComponentUnknown, resolve_component
from reft_serve.adapters.manifest import BaseFacts
from reft_serve.errors import (
    AdapterInvalid,
    AdapterUnsupported,
    ImportFlagMissing,
)
from reft_serve.interventions.vocabulary import KINDS, Component, Kind

__all__ = ["CONFIG", "FIELDS", "SaveFaults", "Site", "checkpoint_sites", "recorded_sites"]

CONFIG = "config.json"
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
_KEY = re.compile(r"[\w.\[\]]{1,512}#\d{1,4}")
# Both namings: "layer_8_comp_block_output_unit_pos_nunit_1#0", and with dots (and "repr") before
# pyvene 0.1.7.
_KEY_PARTS = re.compile(
    r"layer[_.](\d{1,5})[_.](?:comp|repr)[_.](\w+)[_.]unit[_.](\w+)[_.]nunit[_.](\d+)#(\d+)"
)
_MAX_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Site:
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
class SaveFaults:
    """Faults of a save; those in `unsupported` are unsupported features of a valid save."""

    where: str
    broken: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)

    def settle(self) -> None:
        if self.broken:
            raise AdapterInvalid(self.where, self.broken + self.unsupported)
        if self.unsupported:
            raise AdapterUnsupported(self.where, self.unsupported)


def recorded_sites(
    config: dict[str, Any], base: BaseFacts, flags: ImportFlags, faults: SaveFaults
) -> list[Site]:
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
    sites = []
    for k, (row, recorded, key) in enumerate(zip(rows, types, keys, strict=True)):
        kind, sign = _recorded_kind(k, recorded, flags, faults)
        place = _component_of_row(k, row, base, faults, hides_source=sign is not None)
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            faults.broken.append(
                f"{CONFIG}: sorted_keys, {k}: {str(key)[:80]!r} is not the key of an intervention"
            )
        elif kind and place:
            sites.append(Site(key, kind, *place, sign))
    return sites


def _recorded_kind(
    k: int, recorded: object, flags: ImportFlags, faults: SaveFaults
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


def _component_of_row(
    k: int, row: object, base: BaseFacts, faults: SaveFaults, *, hides_source: bool = False
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
    except ComponentUnknown as exc:
        faults.unsupported.append(f"intervention {k}: {exc}")
    return None


def checkpoint_sites(
    source: Path, base: BaseFacts, flags: ImportFlags, faults: SaveFaults
) -> list[Site]:
    if flags.kind is None:
        raise ImportFlagMissing(
            f"{source} has no {CONFIG}, as trainer checkpoints do not, so the kind of its "
            f"interventions is not recorded: give --kind, one of {', '.join(KINDS)}"
        )
    numbered: list[tuple[int, Site]] = []
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
        place = _component_of_row(len(numbered), row, base, faults)
        if place:
            kind: Any = flags.kind
            numbered.append((int(match[5]), Site(key, kind, *place)))
    if len(numbered) > _MAX_ROWS:
        faults.broken.append(f"it has {len(numbered)} interventions; at most {_MAX_ROWS} are taken")
    # The order of pyreft's recipes (`layers + layers`): every first intervention of a layer, then
    # every second one.
    return [
        place
        for _, place in sorted(
            numbered, key=lambda item: (item[0], item[1].layer, item[1].component)
        )
    ]
