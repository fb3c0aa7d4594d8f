"""The rank of a token among logprobs, which vLLM compiles at the first request that asks for
logprobs.

On a CPU, `torch.compile` builds C++ with the system's compiler. That stops the step, and with it
every request of the engine, for seconds to a minute. The function has one line; uncompiled, it
takes microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["wrap_batched_count_greater_than"]


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
