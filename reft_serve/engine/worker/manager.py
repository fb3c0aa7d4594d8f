"""The worker's adapter manager: what vLLM's model runners know as `lora_manager`.

It answers vLLM's calls to its LoRA manager, serves ReFT directories itself and hands LoRA
directories to vLLM's manager, which exists only where LoRA is on. A directory that holds both goes
to both.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from vllm.config import VllmConfig
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.request import LoRARequest

from reft_serve.adapters.manifest import MAX_PASSES
from reft_serve.engine.adapter_ref import FIRST_ID, GENERATED, WITH_LORA, adapter_ref, lora_id_of
from reft_serve.engine.vllm_config import base_facts, limits_of, settings_of, share_of
from reft_serve.engine.worker.edits import Edits, attach_edits
from reft_serve.engine.worker.heads import Heads, with_heads
from reft_serve.engine.worker.hook_points import decoder_layers, install_hooks, places_of
from reft_serve.engine.worker.loras import LoraManager, lora_request_of
from reft_serve.engine.worker.registry import Folded, Registry
from reft_serve.engine.worker.rows import Rows, StepRequest, rows_of
from reft_serve.engine.worker.token_types import with_token_types
from reft_serve.errors import AdapterUnsupported
from reft_serve.interventions.batched import UnitPool
from reft_serve.interventions.positions import Part

__all__ = ["AdapterManager", "StepBatch"]


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """The requests of a step as integer arrays over requests, in the order of their tokens.

    engine_ids: `lora_int_id` of each, 0 for the base. The others count tokens; `sampled` are those
    that get logits. requests: the adapters by `lora_int_id`; evaluated only if one of them is
    needed.
    """

    engine_ids: NDArray[Any]
    prompt_lens: NDArray[Any]
    computed: NDArray[Any]
    scheduled: NDArray[Any]
    sampled: NDArray[Any]
    requests: Callable[[], Mapping[int, LoRARequest]]


class AdapterManager:
    """One worker's adapters.

    Args:
        model: the loaded base model; its decoder layers get their hooks here, before anything is
            compiled.
        lora: vLLM's manager with the model's linear layers wrapped, or None for a ReFT-only engine.

    Raises:
        EngineUnsupported: the model has no decoder layers that can be edited.
    """

    def __init__(
        self, model: nn.Module, config: VllmConfig, device: torch.device, lora: LoraManager | None
    ) -> None:
        settings = settings_of(config)
        limits = limits_of(config)
        base = base_facts(config)
        assert config.lora_config is not None
        assert limits.max_rank is not None
        slots = config.lora_config.max_loras
        layers = decoder_layers(model, base.num_hidden_layers)
        places = places_of(layers, settings.components)
        share = share_of(limits, len(layers), base.num_hidden_layers)
        pool = UnitPool(slots * share, limits.max_rank, base.hidden_size, device)
        table = torch.zeros(
            len(places), MAX_PASSES, slots * len(Part), dtype=torch.int32, device=device
        )
        self.edits = Edits(pool, table, config.scheduler_config.max_num_batched_tokens)
        install_hooks(layers, places, attach_edits(self.edits))
        self.registry = Registry(
            self.edits, slots, places, layers.keys(), base, limits, settings.max_adapter_bytes
        )
        self._heads = Heads(device)
        with_heads(model, self._heads)
        with_token_types(model)
        self._lora = lora
        self._layers = frozenset(layers)
        self._active_loras = 0
        self._has_dummies = False
        self._steps = self._row_steps = self._rows_edited = 0
        self._hold_seconds = 0.0
        # Host time of the last steps, apart for those that edit and those that need not.
        self._row_seconds: deque[float] = deque(maxlen=256)
        self._idle_seconds: deque[float] = deque(maxlen=256)

    @property
    def num_active(self) -> int:
        """Number of adapters for graph dispatch: 0 if the prepared step has neither a ReFT row nor
        a LoRA.
        """
        return int(self.edits.active) + self._active_loras

    def prepare(self, batch: StepBatch) -> None:
        """Set the rows of the coming step, loading what is missing. Costs one vector test if
        nothing is edited.
        """
        started = time.perf_counter()
        rows = self._rows(batch) if batch.engine_ids.any() else None
        if rows is None:
            self.edits.clear()
        else:
            self.edits.set_rows(rows.row_T, rows.key_T, rows.scale_T)
            self._row_steps += 1
            self._rows_edited += len(rows.row_T)
        self._steps += 1
        (self._idle_seconds if rows is None else self._row_seconds).append(
            time.perf_counter() - started
        )
        if self._lora is not None:
            self._prepare_lora(batch)

    def may_edit(self, batch: StepBatch) -> NDArray[np.bool_]:
        """Which requests can have edited tokens in this step: those in their prompt, and any whose
        adapter edits on.
        """
        ours = batch.engine_ids >= FIRST_ID
        may: NDArray[np.bool_] = ours & (
            (batch.computed < batch.prompt_lens) | ((batch.engine_ids & GENERATED) > 0)
        )
        return may

    def needs_adapter(self, batch: StepBatch) -> NDArray[np.bool_]:
        """Which requests make the step one with adapters: those that may be edited, and those of a
        LoRA.
        """
        return _has_lora(batch.engine_ids) | self.may_edit(batch)

    def _rows(self, batch: StepBatch) -> Rows | None:
        candidates = np.flatnonzero(self.may_edit(batch))
        if not len(candidates):
            return None
        first_row = np.cumsum(batch.scheduled) - batch.scheduled
        adapters = batch.requests()
        requests = []
        for i in candidates.tolist():
            request = adapters[int(batch.engine_ids[i])]
            identity = adapter_ref(request)
            assert identity is not None
            share = (batch.prompt_lens[i], batch.computed[i], batch.scheduled[i], first_row[i])
            requests.append(StepRequest(identity, request.lora_path, *(int(n) for n in share)))
        in_use = {request.identity.digest for request in requests}
        return rows_of(requests, lambda r: self.registry.slot_of(r.identity, r.path, in_use))

    def _prepare_lora(self, batch: StepBatch) -> None:
        assert self._lora is not None
        ids = np.where(_has_lora(batch.engine_ids), batch.engine_ids, 0).astype(np.int64)
        active = np.unique(ids[ids > 0]).tolist()
        adapters = batch.requests() if active else {}
        loras = set()
        for number in active:
            lora = lora_request_of(adapters[number])
            assert lora is not None
            ids[ids == number] = lora.lora_int_id
            loras.add(lora)
        # Also if no LoRA is active: its wrapped layers read the mapping of the step.
        mapping = LoRAMapping(
            tuple(ids.repeat(batch.scheduled)), tuple(ids.repeat(batch.sampled)), is_prefill=True
        )
        self._lora.set_active_adapters(loras, mapping)
        self._active_loras = len(loras)

    def hold(self, request: LoRARequest, read: Folded | None) -> None:
        """Keep the units of a version at hand for its coming requests; `read`, where the core has
        read them.
        """
        started = time.perf_counter()
        try:
            self._hold(request, read)
        finally:
            self._hold_seconds += time.perf_counter() - started

    def _hold(self, request: LoRARequest, read: Folded | None) -> None:
        identity = adapter_ref(request)
        assert identity is not None
        lora = self._lora_of(request)
        if lora is not None and self._lora is not None and not self._lora.holds(lora):
            self._lora.hold(lora, self._layers)
            # Read after the LoRA, so that files which changed in between are found by their digest.
            read = self.registry.read(identity, request.lora_path)
        if identity.head:
            read = read or self.registry.read(identity, request.lora_path)
            assert read.head_spec is not None
            assert read.head is not None
            self._heads.hold(identity.digest, request.lora_path, read.head_spec, read.head)
        self.registry.hold(identity, request.lora_path, read)

    def release(self, digests: list[str]) -> None:
        """Release held versions."""
        for digest in digests:
            self.registry.release(digest)
            self._heads.release(digest)
            if self._lora is not None:
                self._lora.release(digest)

    def _lora_of(self, request: LoRARequest) -> LoRARequest | None:
        lora = lora_request_of(request)
        if lora is not None and self._lora is None:
            held = "it also holds a LoRA" if adapter_ref(request) else "it is not a ReFT adapter"
            raise AdapterUnsupported(
                request.lora_path,
                [f"{held}, and this engine serves ReFT only: set REFT_LORA=on to serve LoRA"],
            )
        return lora

    # What vLLM calls on its own manager from here on.

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping | None) -> None:
        """Warm-up and graph capture. Real steps come through `prepare`; V2 then calls here with an
        empty mapping.

        A multimodal step comes once more, for the LoRAs of its towers, which ReFT does not edit.
        """
        if mapping is not None and mapping.type is not LoRAMappingType.LANGUAGE:
            self._set_tower_loras(requests, mapping)
            return
        if mapping is not None and not mapping.index_mapping:
            return
        if requests:
            self.edits.set_dummy()
        else:
            self.edits.clear()
        if self._lora is not None:
            self._lora.set_active_adapters(requests, mapping)
            self._active_loras = len(requests)

    def _set_tower_loras(self, requests: set[LoRARequest], mapping: LoRAMapping) -> None:
        assert self._lora is not None, "supports_tower_connector_lora denied it"
        of_tokens, of_prompts = (
            tuple(i if i < FIRST_ID else 0 for i in ids)
            for ids in (mapping.index_mapping, mapping.prompt_mapping)
        )
        loras = {request for request in requests if request.lora_int_id < FIRST_ID}
        self._lora.set_active_adapters(
            loras, replace(mapping, index_mapping=of_tokens, prompt_mapping=of_prompts)
        )

    def add_adapter(self, request: LoRARequest) -> bool:
        identity = adapter_ref(request)
        lora = self._lora_of(request)
        if identity is None:
            return self._lora is not None and bool(self._lora.add_adapter(lora))
        if lora is not None and self._lora is not None:
            self._lora.add_adapter(lora)
        self.registry.slot_of(identity, request.lora_path, ())
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        if adapter_id < FIRST_ID:
            return self._lora is not None and bool(self._lora.remove_adapter(adapter_id))
        removed = self.registry.remove(adapter_id)
        if self._lora is not None and adapter_id & WITH_LORA:
            for digest in removed:
                self._lora.remove_adapter(lora_id_of(digest))
        return bool(removed)

    def pin_adapter(self, adapter_id: int) -> bool:
        if adapter_id < FIRST_ID:
            return self._lora is not None and bool(self._lora.pin_adapter(adapter_id))
        return self.registry.pin(adapter_id)

    def list_adapters(self) -> set[int]:
        loras = self._lora.list_adapters() if self._lora is not None else set()
        return self.registry.engine_ids() | {number for number in loras if number < FIRST_ID}

    def remove_all_adapters(self) -> None:
        """Forget every adapter; after a dummy run, which an idle data-parallel rank makes in every
        step, only vLLM's.
        """
        self.edits.clear()
        if not self._has_dummies:
            self.registry.remove_all()
        self._has_dummies = False
        if self._lora is not None:
            self._lora.remove_all_adapters()

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        if self._lora is None:
            yield
        else:
            with self._lora.dummy_lora_cache():
                yield

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        self._has_dummies = True
        return self._lora is not None and bool(self._lora.add_dummy_lora(request, rank))

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return (
            default_rank
            if self._lora is None
            else int(self._lora.get_dummy_lora_warmup_rank(default_rank))
        )

    def supports_tower_connector_lora(self) -> bool:
        return self._lora is not None and bool(self._lora.supports_tower_connector_lora())

    def counters(self) -> dict[str, float]:
        """Resident adapters, and counters since the start; cheap enough to call while serving."""
        return {
            "slots": self.registry.slots,
            "resident": len(self.registry),
            "steps": self._steps,
            "steps_with_rows": self._row_steps,
            "rows": self._rows_edited,
            "loads": self.registry.loads,
            "evictions": self.registry.evictions,
            "load_seconds": self.registry.seconds_loading,
            "hold_seconds": self._hold_seconds,
        }

    def stats(self) -> dict[str, float]:
        """The counters, and times in seconds: of loads, and of the host's work on rows in the last
        256 steps that edited and the last 256 that did not (`decode_row_*`).
        """
        loads, rows, idle = (
            sorted(spent) or [0.0]
            for spent in (self.registry.load_seconds, self._row_seconds, self._idle_seconds)
        )
        return self.counters() | {
            "pid": os.getpid(),
            "op_bodies": self.edits.bodies,
            "load_seconds_median": loads[len(loads) // 2],
            "load_seconds_last": self.registry.load_seconds[-1]
            if self.registry.load_seconds
            else 0.0,
            "load_seconds_max": loads[-1],
            "row_seconds_median": rows[len(rows) // 2],
            "row_seconds_max": rows[-1],
            "decode_row_seconds_median": idle[len(idle) // 2],
            "decode_row_seconds_max": idle[-1],
            "pool_bytes": self.edits.pool.nbytes,
        }


def _has_lora(engine_ids: NDArray[Any]) -> NDArray[np.bool_]:
    has_lora: NDArray[np.bool_] = (engine_ids > 0) & (
        (engine_ids < FIRST_ID) | ((engine_ids & WITH_LORA) > 0)
    )
    return has_lora
