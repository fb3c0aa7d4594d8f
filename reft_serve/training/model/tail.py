"""The work of the last decoder layer that no target depends on, left out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reft_serve.interventions.layers import ATTENTION
from reft_serve.training.model import attention

__all__ = ["leave_out"]

# Modules of a decoder layer that treat each token by itself.
_TOKENWISE = ("mlp", "self_attn.q_proj", "self_attn.o_proj")


def leave_out(layer: nn.Module, targets: Callable[[], Tensor]) -> None:
    """Compute the parts of the last layer that look at one token at a time for the targets alone.

    Args:
        layer: the last decoder layer; it is changed.
        targets: returns the rows of the current batch's targets, (Y,).
    """
    for name in _TOKENWISE:
        _at_targets(layer, name, targets)
    for name, part in layer.named_children():
        if name in ATTENTION:
            attention.look_from_targets(part)


def _at_targets(layer: nn.Module, name: str, targets: Callable[[], Tensor]) -> None:
    """Restrict a token-wise part of the last layer to the target tokens; the other tokens get
    zeros.
    """
    try:
        part = layer.get_submodule(name)
    except AttributeError:
        return
    shape: list[torch.Size] = []

    def narrow(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Not the first alone: Bloom's MLP takes what it is added to as well.
        size = inputs[0].shape[:2]
        shape[:] = [size]
        return tuple(
            each.flatten(0, 1).index_select(0, targets()).unsqueeze(0)
            if each.shape[:2] == size
            else each
            for each in inputs
        )

    def widen(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        (size,) = shape
        wide_ND = output.new_zeros(size.numel(), output.shape[-1])
        return wide_ND.index_copy(0, targets(), output.squeeze(0)).view(*size, -1)

    part.register_forward_pre_hook(narrow)
    part.register_forward_hook(widen)
