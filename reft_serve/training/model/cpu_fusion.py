"""Small operations of a frozen float32 base, in fewer passes over memory.

transformers writes RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) as six operations, and
rotary embeddings (Su et al. 2021, arXiv 2104.09864) as five for queries and five for keys; autograd
keeps what lies between them, and has as many for the way back. On a CPU each is a pass over all
hidden states, for which a step of a small model waits longer than for the arithmetic. torch.compile
joins them itself.

Letters: T tokens, D hidden width or width of a head, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fuse"]

_ROTARY = "apply_rotary_pos_emb"


def fuse(root: nn.Module) -> int:
    """Fuse every RMSNorm and every rotary embedding below `root` into few passes; returns how many
    were found.

    They are known by their names, and by giving what ours give: some norms add one to their weight,
    some models turn neighbouring entries and not the two halves.
    """
    return sum(_join_norm(module) or _join_rotary(module) for module in root.modules())


def _join_norm(module: nn.Module) -> bool:
    weight: Any = getattr(module, "weight", None)
    eps: float | None = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or eps is None or weight is None:
        return False
    if weight.requires_grad or weight.dtype != torch.float32:
        return False
    ours = partial(_RmsNorm.apply, weight, eps)
    probe_TD = torch.linspace(-2, 3, 2 * len(weight), device=weight.device).view(2, -1)
    if not torch.allclose(module(probe_TD), ours(probe_TD), rtol=1e-5, atol=1e-6):
        return False
    module.forward = ours
    return True


def _join_rotary(module: nn.Module) -> bool:
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return False
    if any(parameter.dtype != torch.float32 for parameter in module.parameters()):
        return False
    if not _turns_halves(forward.__globals__[_ROTARY]):
        return False
    # A copy for this module, in which the name means ours; other models of the process keep theirs.
    names = forward.__globals__ | {_ROTARY: _rotate}
    copy = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(copy, module)
    return True


def _turns_halves(rotary: Callable[..., Any]) -> bool:
    """True if a model's function equals `_rotate`, and rejects partial rotation of a head."""
    q = torch.linspace(-1, 2, 48).view(1, 2, 3, 8)
    k = torch.linspace(2, -1, 24).view(1, 1, 3, 8)
    angles_TD = torch.linspace(0, 3, 12).view(1, 3, 4).repeat(1, 1, 2)
    cos = angles_TD.cos()
    sin = angles_TD.sin()
    try:
        same = all(map(torch.allclose, rotary(q, k, cos, sin), _rotate(q, k, cos, sin)))
    except (TypeError, ValueError, RuntimeError):  # it takes something else
        return False
    with suppress(RuntimeError):
        rotary(q, k, cos[..., :4], sin[..., :4])
        return False
    return same


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float, h: Tensor) -> Tensor:
        scale = (
            torch.linalg.vector_norm(h, dim=-1, keepdim=True)
            .square_()
            .div_(h.shape[-1])
            .add_(eps)
            .rsqrt_()
        )
        ctx.save_for_backward(h, weight, scale)
        out: Tensor = (h * scale).mul_(weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        h, weight, scale = ctx.saved_tensors
        grad = grads[0] * weight
        along = torch.einsum("...d,...d->...", grad, h).unsqueeze(-1) * scale.pow(3) / -h.shape[-1]
        return None, None, grad.mul_(scale).addcmul_(h, along)


class _Rotary(torch.autograd.Function):
    """(x1 cos1 - x2 sin1, x2 cos2 + x1 sin2) of the halves of x (B, H, T, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out = x * cos
        (out1, out2), (x1, x2), (sin1, sin2) = (t.chunk(2, -1) for t in (out, x, sin))
        out1.addcmul_(x2, sin1, value=-1)
        out2.addcmul_(x1, sin2)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        out = grads[0] * cos
        (out1, out2), (grad1, grad2), (sin1, sin2) = (t.chunk(2, -1) for t in (out, grads[0], sin))
        out1.addcmul_(grad2, sin2)
        out2.addcmul_(grad1, sin1, value=-1)
        return out, None, None


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    return _turn(q, cos, sin), _turn(k, cos, sin)


# torch's `apply` has no types.
_turn: Callable[[Tensor, Tensor, Tensor], Tensor] = _Rotary.apply
