"""No request makes the engine compile: what vLLM compiles when it is first needed runs as it is
written on a CPU.
"""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters
from vllm.platforms import current_platform
from vllm.v1.sample import sampler
from vllm.v1.sample.ops import logprobs

from reft_serve.engine import register


def test_ranking_tokens_compiles_nothing_on_a_cpu() -> None:
    assert current_platform.is_cpu()
    register()
    counters.clear()
    logits = torch.randn(3, 64)
    counted = logprobs.batched_count_greater_than(logits, logits[:, :1])
    assert torch.equal(counted, (logits >= logits[:, :1]).sum(-1))
    assert not counters, "torch.compile was called"
    assert sampler.batched_count_greater_than is logprobs.batched_count_greater_than
