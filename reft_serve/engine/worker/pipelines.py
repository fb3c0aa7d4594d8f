"""Pipelines that start without a warm-up.

A later rank of a pipeline receives hidden states into buffers that vLLM makes in its warm-up alone.
On a CPU it leaves the warm-up out if nothing is compiled, as with `--enforce-eager` or LoRA on, and
the first step fails on an assertion (vLLM 0.32, `CPUModelRunner.warming_up_model`,
`GPUModelRunner.sync_and_gather_intermediate_tensors`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["wrap_sync_and_gather_intermediate_tensors"]


def wrap_sync_and_gather_intermediate_tensors(sync: Callable[..., Any]) -> Callable[..., Any]:
    """Around `GPUModelRunner.sync_and_gather_intermediate_tensors`: make the buffers, as a warm-up
    would have, once.
    """

    def sync_and_gather_intermediate_tensors(self: Any, *args: Any, **options: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return sync(self, *args, **options)

    return sync_and_gather_intermediate_tensors
