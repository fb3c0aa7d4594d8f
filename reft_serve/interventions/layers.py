"""A model's decoder layers, found by their structure: training and serving must number the same
ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["ATTENTION", "attention_of", "child_of", "lists_of"]

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
"""The names of a decoder layer's attention."""


def lists_of(model: nn.Module, count: int) -> Iterator[nn.ModuleList]:
    """The lists of `count` modules; the decoder layers are the first one whose modules all contain
    attention.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            yield module


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention of a decoder layer; None if it has none."""
    return child_of(layer, ATTENTION)


def child_of(layer: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The child that has the first of these names that is there; None for a list, which is never
    called itself.
    """
    children = dict(layer.named_children())
    child = next((children[name] for name in names if name in children), None)
    return None if isinstance(child, nn.ModuleList) else child
