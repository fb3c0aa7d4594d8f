"""Attention for packed batches: examples that lie end to end in one row, each attending to itself alone.

Registered with transformers under `PACKED`, so that any model with exchangeable attention takes it. The work per example
is transformers' own `sdpa`, causal and without a mask; neighbours of equal length share one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

__all__ = ["PACKED", "install"]

PACKED = "reft_packed"


def install() -> None:
    """Make `PACKED` known to transformers; again is harmless."""
    AttentionInterface.register(PACKED, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_lengths: Sequence[int] = (),
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend from query (1, heads, N, head_dim); `packed_lengths` comes as an argument of the model's own forward."""
    options.pop("is_causal", None)
    if not packed_lengths:
        return _whole(module, query, key, value, attention_mask, options), None
    runs = [(sum(1 for _ in run), length) for length, run in groupby(packed_lengths)]
    # Split, not sliced: the gradient of each slice would be as large as the whole.
    sizes = [count * length for count, length in runs]
    pieces = (torch.split(t, sizes, dim=2) for t in (query, key, value))
    outputs = []
    for (count, length), *parts in zip(runs, *pieces, strict=True):
        q, k, v = (_rows(t, count, length) for t in parts)
        out_CLHD = _whole(module, q, k, v, None, options)
        outputs.append(out_CLHD.reshape(1, count * length, *out_CLHD.shape[2:]))
    return torch.cat(outputs, dim=1), None


def _rows(t_1HND: Tensor, count: int, length: int) -> Tensor:
    _, heads, _, width = t_1HND.shape
    return t_1HND.reshape(heads, count, length, width).transpose(0, 1)


def _whole(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    out: Tensor = sdpa_attention_forward(module, query, key, value, mask, is_causal=True, **options)[0]
    return out
