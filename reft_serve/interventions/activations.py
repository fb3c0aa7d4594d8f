"""The activations of `vocabulary.ACTIVATION_CODES` in torch, as transformers.activations computes
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["activate"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


# Indexed by activation code.
_FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    F.relu,
    torch.tanh,
    torch.sigmoid,
    F.silu,
    F.gelu,
    _gelu_tanh,
    lambda x: torch.clip(F.gelu(x), -10.0, 10.0),
    lambda x: x * torch.sigmoid(1.702 * x),
    F.hardswish,
    _laplace,
    F.leaky_relu,
    F.mish,
    lambda x: torch.square(F.relu(x)),
    F.relu6,
    lambda x: torch.sqrt(F.softplus(x)),
)


def activate(x: Tensor, code: int) -> Tensor:
    """Apply the activation `code` to every element of `x`."""
    return _FUNCTIONS[code](x)
