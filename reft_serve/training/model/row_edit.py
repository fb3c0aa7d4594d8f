"""Some rows of a matrix taken out, changed and put back, with a backward pass that costs one copy
of the matrix.

The plain way (`index_select`, then `index_copy`) makes the gradient of the taken rows a matrix of
zeros as large as the whole, and adds it to the gradient of the rest: four passes over memory
instead of one.

Letters: N rows, D width, E rows taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["edit_rows"]


def edit_rows(h_ND: Tensor, rows_E: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """`h_ND` with `edit` of its rows `rows_E`, each named once, in their place; the given tensor is
    left as it is.
    """
    rest_ND, taken_ED = _take(h_ND, rows_E)
    return _put(rest_ND, rows_E, edit(taken_ED))


class _Take(torch.autograd.Function):
    """The matrix and its rows. Only `_Put` may use the matrix, since the rows' gradient replaces
    what comes back for it.
    """

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, rows_E: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows_E)
        return h_ND, h_ND.index_select(0, rows_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        rest_ND, taken_ED = grads
        (rows_E,) = ctx.saved_tensors
        return rest_ND.index_copy(0, rows_E, taken_ED), None


class _Put(torch.autograd.Function):
    """The matrix with other rows. What its gradient holds at those rows is for `_Take` to
    replace.
    """

    @staticmethod
    def forward(ctx: Any, rest_ND: Tensor, rows_E: Tensor, new_ED: Tensor) -> Tensor:
        ctx.save_for_backward(rows_E)
        return rest_ND.index_copy(0, rows_E, new_ED)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor]:
        (grad_ND,) = grads
        (rows_E,) = ctx.saved_tensors
        return (grad_ND if ctx.needs_input_grad[0] else None), None, grad_ND.index_select(0, rows_E)


# torch's `apply` has no types.
_take: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _Take.apply
_put: Callable[[Tensor, Tensor, Tensor], Tensor] = _Put.apply
