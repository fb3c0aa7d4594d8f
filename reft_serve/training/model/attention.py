"""Attention for packed batches: examples that lie end to end in one row, each attending to itself
alone.

Registered with transformers under `PACKED`, so that any model with exchangeable attention takes it.
The work per example is transformers' own `sdpa`, causal and without a mask. Neighbours of about
equal length share one call, those that are shorter with padding on the right, which none of their
tokens attends to.

Letters: N tokens of the batch, Y of them with a loss, C examples of a call, L its longest example,
Q the most of an example's tokens with a loss, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

__all__ = ["PACKED", "install", "look_from_targets"]

PACKED = "reft_packed"
# Examples share a call where the shortest has this share of the longest's tokens: small calls cost
# more than some padding.
_ALIKE = 0.8
# Where fewer tokens than this share have a loss, the last layer looks from them alone. It needs a
# mask, which does the work that being causal saves.
_FEW = 0.25
_FROM_TARGETS = "reft_looks_from_targets"


def install() -> None:
    """Make `PACKED` known to transformers; again is harmless."""
    AttentionInterface.register(PACKED, _attend)


def look_from_targets(module: nn.Module) -> None:
    """Restrict the last layer's attention to the tokens with a loss."""
    setattr(module, _FROM_TARGETS, True)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_lengths: Tensor | None = None,
    packed_targets: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend from query (1, H, N, D). As arguments of the model's own forward come
    `packed_lengths`, int64 (examples,) on the CPU, and `packed_targets`, int64 (Y,): the tokens
    with a loss, in their order.
    """
    options.pop("is_causal", None)
    if packed_lengths is None:
        return _whole(module, query, key, value, attention_mask, options), None
    rows = [t.squeeze(0).transpose(0, 1) for t in (query, key, value)]
    attend = partial(_whole, module, options=options)
    calls = list(_calls(packed_lengths.tolist()))
    few = packed_targets is not None and 0 < len(packed_targets) < _FEW * query.shape[2]
    # On a CPU alone, since counting targets would wait for another device.
    if few and query.device.type == "cpu" and getattr(module, _FROM_TARGETS, False):
        assert packed_targets is not None
        return _from_targets(attend, rows, calls, packed_lengths, packed_targets).unsqueeze(0), None
    return _from_all(attend, rows, calls).unsqueeze(0), None


def _from_all(
    attend: Callable[..., Tensor], rows: Sequence[Tensor], calls: Sequence[tuple[int, ...]]
) -> Tensor:
    """(N, H, D) from the queries, keys and values (N, H, D)."""
    # Split, not sliced: the gradient of each slice would be as large as the whole.
    sizes = [sum(lengths) for lengths in calls]
    outputs = []
    for lengths, *parts in zip(calls, *(torch.split(t_NHD, sizes) for t_NHD in rows), strict=True):
        q, k, v = (_apart(t, lengths).transpose(1, 2) for t in parts)
        outputs.append(_together(attend(q, k, v, None), lengths))
    return torch.cat(outputs)


def _from_targets(
    attend: Callable[..., Tensor],
    rows: Sequence[Tensor],
    calls: Sequence[tuple[int, ...]],
    lengths: Tensor,
    targets_Y: Tensor,
) -> Tensor:
    """As `_from_all`, with zeros for all other tokens."""
    queries, keys, values = rows
    ends = lengths.cumsum(0)
    example_Y = torch.bucketize(targets_Y, ends, right=True)
    position_Y = targets_Y - (ends - lengths)[example_Y]
    count_C = torch.bincount(example_Y, minlength=len(lengths))
    turn_Y = torch.arange(len(targets_Y)) - (count_C.cumsum(0) - count_C)[example_Y]
    sizes = [sum(call) for call in calls]
    counts = torch.split(count_C, [len(call) for call in calls])
    taken = [int(count.sum()) for count in counts]
    pieces = zip(
        calls,
        counts,
        *(torch.split(t, taken) for t in (_unpad(queries, targets_Y), position_Y, turn_Y)),
        *(torch.split(t, sizes) for t in (keys, values)),
        strict=True,
    )
    outputs = []
    for call, count, q_YHD, position, turn, k_NHD, v_NHD in pieces:
        most = int(count.max())
        if not most:
            continue
        place_Y = torch.arange(len(call)).repeat_interleave(count) * most + turn
        at_CQ = (
            torch.zeros(len(call) * most, dtype=torch.long)
            .index_copy_(0, place_Y, position)
            .view(len(call), most)
        )
        mask = torch.arange(max(call)) <= at_CQ[:, None, :, None]
        q_CQHD = _pad(q_YHD, place_Y, len(call) * most).view(len(call), most, *q_YHD.shape[1:])
        k, v = (_apart(t, call).transpose(1, 2) for t in (k_NHD, v_NHD))
        outputs.append(_unpad(attend(q_CQHD.transpose(1, 2), k, v, mask).flatten(0, 1), place_Y))
    return _pad(torch.cat(outputs), targets_Y, len(queries))


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
    """The rows at some places; no place is named twice, so that their gradient is copied, not
    added.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(padded)
        return padded.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = grads
        return rows.new_zeros(ctx.size, *rows.shape[1:]).index_copy_(
            0, ctx.saved_tensors[0], rows
        ), None


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
    return (
        _unpad(rows_NHD, _places(lengths, rows_NHD.device))
        if min(lengths) < max(lengths)
        else rows_NHD
    )


@lru_cache(maxsize=64)
def _places(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each token lies among C * L. The layers of a step ask for the same ones."""
    width = max(lengths)
    return torch.cat(
        [torch.arange(start * width, start * width + n) for start, n in enumerate(lengths)]
    ).to(device)


def _whole(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    out: Tensor = sdpa_attention_forward(
        module, query, key, value, mask, is_causal=True, **options
    )[0]
    return out
