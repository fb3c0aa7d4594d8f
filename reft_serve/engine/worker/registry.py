"""Adapters on one worker: which slot each version has, and where its interventions lie in the pool.

A slot is a place in a batch; the interventions of its adapter take units anywhere in the pool, so
adapters of any number of layers share it without holes. The least recently used version makes room,
and only after the new one has been read, verified and found to fit.

A version with unfinished requests is *held*: its units are in the pool or in host memory, so that
no step reads a file or can fail on one, however often the version is evicted and comes back; nor is
a version that is resident ever read again.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from reft_serve.adapters.directory import read_version
from reft_serve.adapters.head import HeadSpec
from reft_serve.adapters.manifest import (
    MAX_PASSES,
    BaseFacts,
    EngineLimits,
    InterventionSpec,
    place_of,
)
from reft_serve.engine.adapter_ref import AdapterRef
from reft_serve.engine.vllm_config import owner_of
from reft_serve.engine.worker.edits import Edits
from reft_serve.engine.worker.hook_points import HookPoint
from reft_serve.errors import AdapterUnsupported
from reft_serve.interventions.heads import Head
from reft_serve.interventions.kinds import Unit, fold
from reft_serve.interventions.positions import Part

__all__ = ["Folded", "Registry", "read_folded"]

_PARTS = {"both": tuple(Part), "prefix": (Part.PREFIX,), "suffix": (Part.SUFFIX,)}


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """A version as a pool takes it: `units[k]` is of `specs[k]`. `head` is its classifier, in the
    form of `head_spec`.
    """

    specs: tuple[InterventionSpec, ...]
    units: tuple[Unit, ...]
    head_spec: HeadSpec | None = None
    head: Head | None = None


def read_folded(
    identity: AdapterRef, path: str, base: BaseFacts, limits: EngineLimits, max_bytes: int
) -> Folded:
    """Read a version, in any process of the engine.

    Raises:
        AdapterNotFound, AdapterInvalid, AdapterChanged: its files are not what they were.
        AdapterUnsupported: this engine cannot serve it.
    """
    adapter = read_version(Path(path), identity.digest, max_bytes)
    faults = limits.faults(adapter.manifest, base)
    if faults:
        raise AdapterUnsupported(path, faults)
    units = tuple(fold(weights) for weights in adapter.weights)
    return Folded(tuple(adapter.manifest.interventions), units, adapter.manifest.head, adapter.head)


@dataclass(frozen=True, slots=True)
class _Resident:
    """Where a version is: its slot, and where in the pool the units of `specs` are."""

    engine_id: int
    slot: int
    specs: tuple[InterventionSpec, ...]
    units: tuple[int, ...]


class Registry:
    """The slots of one worker.

    Args:
        edits: the pool and the table that the op reads; the registry alone writes them, between
            steps.
        slots: how many versions are resident at most.
        places: this worker's places; other ranks of a pipeline own the others.
        layers: the model's layers that this worker holds.
        base, limits, max_bytes: what an adapter is checked against.
    """

    def __init__(
        self,
        edits: Edits,
        slots: int,
        places: Mapping[HookPoint, int],
        layers: Collection[int],
        base: BaseFacts,
        limits: EngineLimits,
        max_bytes: int,
    ) -> None:
        self._edits = edits
        self._places = places
        self._layers = frozenset(layers)
        self._base = base
        self._limits = limits
        self._max_bytes = max_bytes
        self.slots = slots
        self._units_per_slot = edits.pool.units // slots
        self._free_slots = list(range(slots - 1, -1, -1))
        self._free_units = list(range(edits.pool.units, 0, -1))
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        # None for a version that was resident when it came to be held: the pool has it.
        self._held: dict[str, Folded | None] = {}
        self._pinned: set[str] = set()
        self.loads = self.evictions = 0
        self.seconds_loading = 0.0
        self.load_seconds: deque[float] = deque(maxlen=4096)

    def __len__(self) -> int:
        return len(self._residents)

    def slot_of(self, identity: AdapterRef, path: str, in_use: Collection[str]) -> int:
        """The slot of a version, read from `path` if it is not resident. Versions of `in_use` are
        not evicted for it.
        """
        resident = self._residents.get(identity.digest)
        if resident is None:
            resident = self._load(identity, path, in_use)
        self._residents.move_to_end(identity.digest)
        return resident.slot

    def read(self, identity: AdapterRef, path: str) -> Folded:
        """Read a version from its files; raises as `read_folded` does."""
        return read_folded(identity, path, self._base, self._limits, self._max_bytes)

    def hold(self, identity: AdapterRef, path: str, read: Folded | None) -> None:
        """Keep a version's units at hand until `release`: `read`, where another process has read
        them, or else its files.

        Raises:
            AdapterNotFound, AdapterInvalid, AdapterChanged: its files are not what they were.
            AdapterUnsupported: this engine cannot serve it.
        """
        if identity.digest not in self._held:
            resident = identity.digest in self._residents
            self._held[identity.digest] = None if resident else self._local(identity, path, read)

    def release(self, digest: str) -> None:
        """Release a held version; its slot, if it has one, stays until it is evicted."""
        self._held.pop(digest, None)

    def remove(self, engine_id: int) -> list[str]:
        """Free the slots and units of the versions with this id and return their digests; requests
        in progress load them again.
        """
        digests = self._with_id(engine_id)
        for digest in digests:
            self._remove(digest)
        return digests

    def remove_all(self) -> None:
        for digest in list(self._residents):
            self._remove(digest)

    def pin(self, engine_id: int) -> bool:
        """Keep a resident version from eviction; False if it is not resident."""
        digests = self._with_id(engine_id)
        self._pinned.update(digests)
        return bool(digests)

    def engine_ids(self) -> set[int]:
        """The engine ids of the resident versions, as front ends know them."""
        return {resident.engine_id for resident in self._residents.values()}

    def _with_id(self, engine_id: int) -> list[str]:
        return [
            digest
            for digest, resident in self._residents.items()
            if resident.engine_id == engine_id
        ]

    def _remove(self, digest: str) -> None:
        resident = self._residents.pop(digest)
        if digest in self._held and self._held[digest] is None:
            self._held[digest] = Folded(
                resident.specs, tuple(self._edits.pool.read(unit) for unit in resident.units)
            )
        self._pinned.discard(digest)
        self._free_slots.append(resident.slot)
        self._free_units.extend(resident.units)
        self._edits.units_of_LCS[:, :, _keys(resident.slot)] = 0

    def _load(self, identity: AdapterRef, path: str, in_use: Collection[str]) -> _Resident:
        started = time.perf_counter()
        folded = self._held.get(identity.digest) or self._local(identity, path, None)
        self._make_room(len(folded.units), in_use)
        resident = self._write(folded, identity)
        self._residents[identity.digest] = resident
        self.loads += 1
        spent = time.perf_counter() - started
        self.seconds_loading += spent
        self.load_seconds.append(spent)
        return resident

    def _local(self, identity: AdapterRef, path: str, read: Folded | None) -> Folded:
        """This worker's part of a version, checked; reads the files if no worker thread has done
        so.
        """
        whole = read or self.read(identity, path)
        faults = [
            f"intervention {k} edits {spec.where}, which this model does not have"
            for k, spec in enumerate(whole.specs)
            if owner_of(spec) in self._layers and place_of(spec) not in self._places
        ]
        own = [k for k, spec in enumerate(whole.specs) if place_of(spec) in self._places]
        if len(own) > self._units_per_slot:
            faults.append(
                f"more than {self._units_per_slot} of its interventions are on one rank: raise "
                "REFT_MAX_INTERVENTIONS"
            )
        if faults:
            raise AdapterUnsupported(path, faults)
        return Folded(tuple(whole.specs[k] for k in own), tuple(whole.units[k] for k in own))

    def _make_room(self, units: int, in_use: Collection[str]) -> None:
        # Pinned versions go last, and only for a step that needs every slot: it could not run
        # otherwise.
        evictable = [digest for digest in self._residents if digest not in in_use]
        for digest in sorted(evictable, key=self._pinned.__contains__):
            if self._free_slots and len(self._free_units) >= units:
                return
            self._remove(digest)
            self.evictions += 1

    def _write(self, folded: Folded, identity: AdapterRef) -> _Resident:
        slot = self._free_slots.pop()
        units = tuple(self._free_units.pop() for _ in folded.units)
        table = torch.zeros(len(self._places), MAX_PASSES, len(Part), dtype=torch.int32)
        for at, spec, unit in zip(units, folded.specs, folded.units, strict=True):
            self._edits.pool.write(at, unit)
            for part in _PARTS[spec.part]:
                column = table[self._places[place_of(spec)], :, part]
                column[int((column > 0).sum())] = at
        self._edits.units_of_LCS[:, :, _keys(slot)] = table.to(self._edits.units_of_LCS.device)
        return _Resident(identity.engine_id, slot, folded.specs, units)


def _keys(slot: int) -> slice:
    return slice(slot * len(Part), (slot + 1) * len(Part))
