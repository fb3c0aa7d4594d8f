"""Workarounds of vLLM's own faults on a CPU, with no part in ReFT. `engine/seams.py` has the report
of each; once vLLM has repaired one, a test of `tests/engine` fails and it can go.

Rows without a LoRA
    Their index is -1, by which vLLM's plain torch operations take the last slot's LoRA once it is
    in use (`bgmv_expand`, `bgmv_expand_slice`).
    https://github.com/vllm-project/vllm/pull/48421,
    https://github.com/vllm-project/vllm/pull/49656
Pipelines without a warm-up
    A later rank of a pipeline receives hidden states into buffers that vLLM makes in its warm-up
    alone. On a CPU it leaves the warm-up out if nothing is compiled, as with `--enforce-eager` or
    LoRA on, and the first step fails on an assertion (`CPUModelRunner.warming_up_model`,
    `GPUModelRunner.sync_and_gather_intermediate_tensors`). Not reported.
Seeds of requests whose prompts arrive in chunks
    vLLM samples a token after every chunk and throws all but the last away. To undo what that took
    from a request's generator it moves the generator's offset back, which CUDA's generators have
    and the CPU's do not: the step raises, and the engine ends (`GPUModelRunner._bookkeeping_sync`).
    The generator's state is kept before and put back after, so that a seed gives the same answer
    however its prompt was cut. Not reported; the offset came with
    https://github.com/vllm-project/vllm/pull/10097
The rank of a token among logprobs
    vLLM compiles its one line at the first request that asks for logprobs. On a CPU,
    `torch.compile` builds C++ with the system's compiler: that stops the step, and with it every
    request of the engine, for seconds to a minute. Uncompiled, the function takes microseconds.
    Not reported for vLLM; https://github.com/torch-spyre/sendnn-inference/issues/550 describes it.
AMX, Intel's matrix instructions
    Linux gives a process the state of AMX on request only (arch_prctl, ARCH_REQ_XCOMP_PERM). A
    process that uses AMX without it ends by SIGILL. vLLM's attention on a CPU uses AMX for 16-bit
    models and does not ask. oneDNN asks when one of oneDNN's matrix products uses AMX, which those
    of a short prompt do not. The first short prompt of an engine then ended its worker, so the
    plugin asks, once in every process. Not reported.
"""

from __future__ import annotations

import ctypes
import inspect
import platform
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

__all__ = [
    "permit_amx",
    "wrap_batched_count_greater_than",
    "wrap_bgmv_expand",
    "wrap_bookkeeping_sync",
    "wrap_sample",
    "wrap_sync_and_gather_intermediate_tensors",
]

_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


def wrap_bgmv_expand(original: Any) -> Callable[..., None]:
    """Around the CPU's `bgmv_expand` and `bgmv_expand_slice`: rows without a LoRA get none."""
    signature = inspect.signature(original)

    def expand(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        rows = call.arguments["lora_indices_tensor"] < 0
        call.arguments["inputs"] = call.arguments["inputs"].masked_fill(rows[:, None], 0)
        original(*call.args, **call.kwargs)

    return expand


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


def wrap_sample(sample: Callable[..., Any]) -> Callable[..., Any]:
    """Around `GPUModelRunner._sample`."""

    def _sample(self: Any, *args: Any, **options: Any) -> Any:
        states = [(each, each.get_state()) for each in _thrown_away(self).values()]
        sampled = sample(self, *args, **options)
        for generator, state in states:
            generator.set_state(state)
        return sampled

    return _sample


def wrap_bookkeeping_sync(bookkeeping: Callable[..., Any]) -> Callable[..., Any]:
    """Around `GPUModelRunner._bookkeeping_sync`, which finds nothing left to undo."""

    def _bookkeeping_sync(self: Any, *args: Any, **options: Any) -> Any:
        hidden = _thrown_away(self)
        for row in hidden:
            del self.input_batch.generators[row]
        try:
            return bookkeeping(self, *args, **options)
        finally:
            self.input_batch.generators.update(hidden)

    return _bookkeeping_sync


def _thrown_away(runner: Any) -> dict[int, torch.Generator]:
    """The generators on a CPU, by row, of those requests whose token of this step does not
    count.
    """
    generators: dict[int, torch.Generator] = runner.input_batch.generators
    if runner.device.type != "cpu" or not generators:
        return {}
    rows = np.nonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])[0]
    return {int(row): generators[row] for row in map(int, rows) if row in generators}


def wrap_batched_count_greater_than(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Around `batched_count_greater_than`: on a CPU, call the function as it is written."""
    from vllm.platforms import current_platform

    chosen = (
        getattr(compiled, "_torchdynamo_orig_callable", compiled)
        if current_platform.is_cpu()
        else compiled
    )

    def call(*args: Any, **options: Any) -> Any:
        return chosen(*args, **options)

    return call


def permit_amx() -> bool:
    """Ask Linux for the state of AMX; False if this machine has none. Threads and child processes
    inherit it.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    result: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    return result == 0
