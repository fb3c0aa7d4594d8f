"""Attention for packed batches: examples that lie end to end in one row, each attending to itself alone.

Registered with transformers under `PACKED`, so that any model with exchangeable attention takes it. The work per example
is transformers' own `sdpa`, causal and without a mask. Neighbours of about equal length share one call, those that are
shorter with padding on the right, where no token of theirs looks.

Letters: N tokens of the batch, C examples of a call, L its longest example, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

__all__ = ["PACKED", "install"]

PACKED = "reft_packed"
# Examples share a call where the shortest has this share of the longest's tokens: small calls cost more than some padding.
_ALIKE = 0.8


def install() -> None:
    """Make `PACKED` known to transformers; again is harmless."""
    AttentionInterface.register(PACKED, _attend)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_lengths: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend from query (1, H, N, D); `packed_lengths`, int64 (examples,) on the CPU, comes as an argument of the model's
    own forward.
    """
    options.pop("is_causal", None)
    if packed_lengths is None:
        return _whole(module, query, key, value, attention_mask, options), None
    calls = list(_calls(packed_lengths.tolist()))
    # Split, not sliced: the gradient of each slice would be as large as the whole.
    sizes = [sum(lengths) for lengths in calls]
    pieces = (torch.split(t.squeeze(0).transpose(0, 1), sizes) for t in (query, key, value))
    outputs = []
    for lengths, *parts in zip(calls, *pieces, strict=True):
        q, k, v = (_apart(t, lengths).transpose(1, 2) for t in parts)
        outputs.append(_together(_whole(module, q, k, v, None, options), lengths))
    return torch.cat(outputs).unsqueeze(0), None


def _calls(lengths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    call: list[int] = []
    for length in lengths:
        if call and not _ALIKE * max(call) <= length <= min(call) / _ALIKE:
            yield tuple(call)
            call = []
        call.append(length)
    yield tuple(call)


class _Pad(torch.autograd.Function):
    """Rows to some places among `size`, with zeros at the others."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """The rows at some places; no place is named twice, so that their gradient is copied, not added."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(padded)
        return padded.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = grads
        return rows.new_zeros(ctx.size, *rows.shape[1:]).index_copy_(0, ctx.saved_tensors[0], rows), None


# torch's `apply` has no types.
_pad: Callable[[Tensor, Tensor, int], Tensor] = _Pad.apply
_unpad: Callable[[Tensor, Tensor], Tensor] = _Unpad.apply


def _apart(rows_NHD: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Each example by itself: (C, L, H, D)."""
    if min(lengths) < max(lengths):
        rows_NHD = _pad(rows_NHD, _places(lengths, rows_NHD.device), len(lengths) * max(lengths))
    return rows_NHD.reshape(len(lengths), max(lengths), *rows_NHD.shape[1:])


def _together(apart_CLHD: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The way back, (N, H, D)."""
    rows_NHD = apart_CLHD.flatten(0, 1)
    return _unpad(rows_NHD, _places(lengths, rows_NHD.device)) if min(lengths) < max(lengths) else rows_NHD


@lru_cache(maxsize=64)
def _places(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each token lies among C * L. The layers of a step ask for the same ones."""
    width = max(lengths)
    return torch.cat([torch.arange(start * width, start * width + n) for start, n in enumerate(lengths)]).to(device)


def _whole(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    out: Tensor = sdpa_attention_forward(module, query, key, value, mask, is_causal=True, **options)[0]
    return out
