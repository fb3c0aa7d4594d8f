"""The worker's side of the seam, for both model runners of vLLM.

V1 (`gpu_model_runner`, also the CPU's) asks `set_active_loras` while it prepares a step and
dispatches graphs after; V2 (`worker/gpu`) asks its `LoraState` first what is active, to pick a
graph, and then for the mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import supports_lora
from vllm.v1.worker.gpu.lora_utils import LoraState

from reft_serve.adapters.engine_fault import EngineFault
from reft_serve.engine.vllm_config import settings_of
from reft_serve.engine.worker.loras import LoraManager
from reft_serve.engine.worker.manager import AdapterManager, StepBatch
from reft_serve.engine.worker.registry import Folded
from reft_serve.errors import EngineUnsupported

__all__ = [
    "reft_add",
    "reft_counters",
    "reft_hold",
    "reft_release",
    "reft_stats",
    "wrap_determine_batch_execution_and_padding",
    "wrap_load_lora_model",
    "wrap_set_active_loras",
]


def wrap_load_lora_model(_: Any) -> Callable[..., nn.Module]:
    """In place of `LoRAModelRunnerMixin.load_lora_model`: our manager, and vLLM's own inside it
    where LoRA is on.
    """

    def load_lora_model(
        self: Any, model: nn.Module, vllm_config: VllmConfig, device: torch.device
    ) -> nn.Module:
        wanted = settings_of(vllm_config).lora
        lora = None
        if wanted == "on" and not supports_lora(model):
            raise EngineUnsupported(
                f"{type(model).__name__} does not support LoRA in vLLM: set REFT_LORA=off"
            )
        # LoRA wraps the linear layers inside the decoder layers, whose outputs the edits then see.
        if wanted != "off" and supports_lora(model):
            lora = LoraManager(vllm_config, device, model.embedding_modules)
            model = lora.create_lora_manager(model, vllm_config)
        self.lora_manager = AdapterManager(model, vllm_config, device, lora)
        state = getattr(self, "lora_state", None)
        if state is not None:
            self.lora_state = RowAwareLoraState(len(state.lora_ids), self)
        return model

    return load_lora_model


def wrap_set_active_loras(_: Any) -> Callable[..., None]:
    """In place of `LoRAModelRunnerMixin.set_active_loras`, which V1 calls once per step."""

    def set_active_loras(
        self: Any,
        input_batch: Any,
        num_scheduled_tokens: NDArray[Any],
        num_sampled_tokens: NDArray[Any] | None = None,
        mapping_type: Any = None,
    ) -> None:
        n = input_batch.num_reqs
        self.lora_manager.prepare(
            StepBatch(
                input_batch.request_lora_mapping[:n],
                input_batch.num_prompt_tokens[:n],
                input_batch.num_computed_tokens_cpu[:n],
                num_scheduled_tokens[:n],
                np.ones(n, np.int32) if num_sampled_tokens is None else num_sampled_tokens[:n],
                lambda: input_batch.lora_id_to_lora_request,
            )
        )

    return set_active_loras


def wrap_determine_batch_execution_and_padding(original: Any) -> Callable[..., Any]:
    """Around V1's `_determine_batch_execution_and_padding`: a step without rows takes the graph
    without adapters.
    """

    def determine(self: Any, *args: Any, **kwargs: Any) -> Any:
        manager = getattr(self, "lora_manager", None)
        if isinstance(manager, AdapterManager) and kwargs.get("force_num_active_loras") is None:
            kwargs["force_num_active_loras"] = manager.num_active
        return original(self, *args, **kwargs)

    return determine


class RowAwareLoraState(LoraState):  # type: ignore[misc]  # vllm is not type-checked
    """V2's `LoraState` with our rows: same calls, but "active" means that this step edits something
    or runs a LoRA.
    """

    def __init__(self, max_num_reqs: int, runner: Any) -> None:
        super().__init__(max_num_reqs)
        self._runner = runner

    def get_activate_loras(self, req_ids: list[str]) -> set[LoRARequest]:
        """The adapters that this step needs; asked before the step is prepared, so a prompt chunk
        counts as a whole.
        """
        if not self._may_need_adapters():
            return set()
        index_of = self._runner.req_states.req_id_to_index
        at = np.fromiter(map(index_of.__getitem__, req_ids), np.intp, len(req_ids))
        batch = self._batch(at, np.ones(len(at), np.int64))
        needed = set(batch.engine_ids[self._runner.lora_manager.needs_adapter(batch)].tolist())
        adapters = self._adapters() if needed else {}
        return {adapters[number] for number in needed}

    def make_lora_inputs(
        self, req_ids: list[str], idx_mapping: NDArray[Any], num_scheduled_tokens: NDArray[Any]
    ) -> tuple[tuple[int, ...], tuple[int, ...], set[LoRARequest]]:
        """Prepare the step's rows; what is returned continues to `set_active_adapters`, which then
        leaves the rows alone.
        """
        batch = self._batch(
            idx_mapping if self._may_need_adapters() else None, num_scheduled_tokens
        )
        self._runner.lora_manager.prepare(batch)
        return (), (), set()

    def _may_need_adapters(self) -> bool:
        """True if any request known to the worker has edits or a LoRA. Requests outside the step
        count too, as do ended ones whose index is free.
        """
        everyone = self._batch(slice(None), self.lora_ids)
        return bool(self._runner.lora_manager.needs_adapter(everyone).any())

    def _batch(self, at: NDArray[Any] | slice | None, scheduled: NDArray[Any]) -> StepBatch:
        """The step of the requests at these indices; of none that has an adapter where `at` is
        None.
        """
        ones = np.ones(len(scheduled), np.int32)
        if at is None:
            nobody = np.zeros_like(ones)
            return StepBatch(nobody, ones, ones, scheduled, ones, dict)
        states = self._runner.req_states
        return StepBatch(
            self.lora_ids[at],
            states.prompt_len.np[at],
            states.num_computed_tokens_np[at],
            scheduled,
            ones,
            self._adapters,
        )

    def _adapters(self) -> Mapping[int, LoRARequest]:
        return {request.lora_int_id: request for request in self.lora_requests.values()}


def reft_hold(self: Any, request: LoRARequest, read: Folded | None) -> EngineFault | None:
    """Called on every worker before a version gets its first unfinished request, and before it is
    loaded; answers what went wrong, if anything.
    """
    return _fault(self.model_runner.lora_manager.hold, request, read)


def reft_release(self: Any, digests: list[str]) -> None:
    """Called on every worker when versions without requests need not be held any longer."""
    self.model_runner.lora_manager.release(digests)


def reft_add(self: Any, request: LoRARequest) -> EngineFault | None:
    """A worker's `add_lora`, answering what went wrong, if anything."""
    return _fault(self.add_lora, request)


def _fault(call: Callable[..., object], *args: Any) -> EngineFault | None:
    # Answered and not raised: vLLM stops reading at the first rank that raises, and takes what the
    # others say for their answers to its next call, which may be a step.
    try:
        call(*args)
    except Exception as exc:
        return EngineFault.of(exc)
    return None


def reft_counters(self: Any) -> dict[str, float]:
    """A worker's plain counters, which the front end asks for while it serves; empty where adapters
    are off.
    """
    manager = getattr(self.model_runner, "lora_manager", None)
    return manager.counters() if isinstance(manager, AdapterManager) else {}


def reft_stats(self: Any) -> dict[str, float]:
    """A worker's counters, for `collective_rpc("reft_stats")`; empty where adapters are off."""
    manager = getattr(self.model_runner, "lora_manager", None)
    return manager.stats() if isinstance(manager, AdapterManager) else {}
