"""vLLM's own LoRA manager, which also serves the LoRA of an adapter that holds both."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from reft_serve.adapters.structure import unknown_modules
from reft_serve.engine.adapter_ref import adapter_ref, lora_id_of
from reft_serve.errors import AdapterUnsupported

__all__ = ["LoraManager", "lora_request_of"]

_LAYER = re.compile(r"\.(\d+)\.")


def lora_request_of(request: LoRARequest) -> LoRARequest | None:
    """The request by which the LoRA of an adapter goes to vLLM's manager: itself for a LoRA, None
    for ReFT alone.
    """
    identity = adapter_ref(request)
    if identity is None:
        return request
    # vLLM takes requests of one name for equal, and two versions of one name may be in one step.
    return (
        LoRARequest(identity.digest, lora_id_of(identity.digest), request.lora_path)
        if identity.lora
        else None
    )


class LoraManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]  # vllm is not type-checked
    """vLLM's manager, with the LoRAs of held versions in host memory, so that no step reads their
    files.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[int, LoRAModel] = {}

    def hold(self, request: LoRARequest, layers: Collection[int]) -> None:
        """Read a LoRA and keep it until `release`. `layers` are the model's layers that this worker
        holds.

        Raises:
            LoRAAdapterNotFoundError: its files are gone.
            AdapterUnsupported: vLLM refuses it, or it is for modules that the model has not or that
                have other shapes, which vLLM would pass over in silence, or would fail at in a
                step.
        """
        try:
            lora = super()._load_adapter(request)
        except LoRAAdapterNotFoundError:
            raise
        except (ValueError, TypeError, RuntimeError, KeyError) as exc:
            raise AdapterUnsupported(request.lora_path, [f"its LoRA: {exc}"]) from exc
        faults = [*self._unknown(lora, layers), *self._misshapen(lora)]
        if faults:
            raise AdapterUnsupported(request.lora_path, faults)
        self._held[request.lora_int_id] = lora

    def _unknown(self, lora: LoRAModel, layers: Collection[int]) -> Iterator[str]:
        packed = {name for names in self._adapter_manager.packed_modules.values() for name in names}
        unknown = sorted(set(lora.loras) - set(self._adapter_manager.modules) - packed)
        here = [
            name
            for name in unknown
            if (layer := _LAYER.search(name)) is None or int(layer[1]) in layers
        ]
        yield from unknown_modules(here)

    def _misshapen(self, lora: LoRAModel) -> Iterator[str]:
        """Matrices that do not meet their module, as far as a module says its sizes."""
        whole = {
            part: name
            for name, parts in self._adapter_manager.packed_modules.items()
            for part in parts
        }
        for name, held in sorted(lora.loras.items()):
            module = self._adapter_manager.modules.get(whole.get(name, name))
            base = getattr(module, "base_layer", None)
            inputs = getattr(base, "input_size", None)
            outputs = None if name in whole else getattr(base, "output_size", None)
            for half, side, size in ((held.lora_a, 1, inputs), (held.lora_b, 0, outputs)):
                if (
                    isinstance(half, torch.Tensor)
                    and half.ndim == 2
                    and size not in (None, half.shape[side])
                ):
                    what = "inputs" if side else "outputs"
                    yield f"its LoRA is for {half.shape[side]} {what} of {name}, which has {size}"

    def holds(self, request: LoRARequest) -> bool:
        """True if `hold` was called for it."""
        return request.lora_int_id in self._held

    def release(self, digest: str) -> None:
        """Release a held version's LoRA; it stays in vLLM's cache until that evicts it."""
        self._held.pop(lora_id_of(digest), None)

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        return self._held.get(lora_request.lora_int_id) or super()._load_adapter(lora_request)
