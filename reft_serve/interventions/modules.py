"""The six kinds as trainable modules: pyreft's parameters, initialisation and dropout around the
reference edit.

With one seed, a module starts at the very values of pyreft's class (`pyreft/interventions.py`): the
draws from torch's random generator are made in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.utils.parametrizations import orthogonal

from reft_serve.errors import AdapterInvalid
from reft_serve.interventions.kinds import Weights, edit
from reft_serve.interventions.vocabulary import (
    ORTHONORMAL,
    ORTHONORMAL_TOLERANCE,
    Kind,
    required_tensors,
)

__all__ = ["Intervention"]


class Intervention(nn.Module):
    """One intervention that learns: `forward` is `kinds.edit` with gradients, then dropout on the
    whole edited state.

    Args:
        kind: which of the six.
        width: hidden width D.
        rank: R, from 1 to D.
        activation: a name of `vocabulary.ACTIVATION_CODES`; "linear" for consreft and lobireft.
        dropout: probability; acts in training mode only. As in pyreft it falls on h + edit, not on
            the edit alone, and consreft and lobireft have none.
        add_bias: whether noreft and nodireft have b2 (nodireft never uses it); no meaning for the
            others.
        dtype: of W, b, W2 and b2. The orthonormal R, and b of consreft and lobireft, are float32
            always, as in pyreft.
    """

    def __init__(
        self,
        kind: Kind,
        width: int,
        rank: int,
        activation: str = "linear",
        dropout: float = 0.0,
        *,
        add_bias: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.activation = activation
        has_source = "W" in required_tensors(kind)
        self.dropout = dropout if has_source else 0.0
        self.rotation: _Rotation | None = None
        self.W: Tensor | None = None
        self.W2: Tensor | None = None
        self.b2: Tensor | None = None
        if kind in ORTHONORMAL:
            self.rotation = _Rotation(width, rank)
        else:
            projection = nn.Linear(width, rank, bias=add_bias).to(dtype)
            self.W2 = projection.weight
            self.b2 = projection.bias
        if has_source:
            source = nn.Linear(width, rank).to(dtype)
            self.W = source.weight
            self.b = source.bias
        else:
            self.b = nn.Parameter(torch.rand(rank))

    @classmethod
    def of(cls, weights: Weights, dropout: float = 0.0) -> Intervention:
        """A module that holds `weights` bit for bit and trains on from there, with R still
        orthonormal.

        Raises:
            AdapterInvalid: R is not orthonormal, as pyreft leaves it after a resumed training: it
                could be served, but not trained further without first becoming another function.
        """
        dtype = weights.b.dtype if weights.W is None else weights.W.dtype
        rank, width = weights.projection.shape
        module = cls(
            weights.kind,
            width,
            rank,
            weights.activation,
            dropout,
            add_bias=weights.b2 is not None,
            dtype=dtype,
        )
        with torch.no_grad():
            for name, value in weights.tensors().items():
                if name != "R":
                    getattr(module, name).copy_(value)
            if module.rotation is not None:
                module.rotation.restore(weights.projection)
        return module

    def forward(self, h: Tensor) -> Tensor:
        """Edit rows `h` (..., D), in h's dtype."""
        # Autocast would round R to half precision and with it its orthonormality.
        with torch.autocast(h.device.type, enabled=False):
            edited = edit(h, self._tensors())
        return drop(edited, self.dropout, self.training)

    def weights(self) -> Weights:
        """A detached copy of the current weights, to save or to serve."""
        copies = {
            name: t.detach().clone(memory_format=torch.contiguous_format)
            for name, t in self._named()
        }
        return Weights.of(self.kind, copies, self.activation)

    def _tensors(self) -> Weights:
        return Weights.of(self.kind, dict(self._named()), self.activation)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        if self.rotation is not None:
            yield "R", self.rotation.rows()
        for name in ("W", "b", "W2", "b2"):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor


class _Rotation(nn.Module):
    """A random R in float32, kept orthonormal by torch's parametrization, as pyreft does it: R.T =
    base @ Q(original).
    """

    weight: Tensor
    parametrizations: Any

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(width, rank)))
        orthogonal(self)

    def rows(self) -> Tensor:
        """R, (rank, width).

        The value of `self.weight` in another form: the product of the Householder reflections is I
        - V T V.T with a (rank, rank) T (compact WY, Schreiber and Van Loan 1989), whose backward
        pass is a few small products, while that of `householder_product` goes through the
        reflections one by one. Nor is the parameter's diagonal read, which torch truncates to
        integers, so that weight decay on it would make R zero.
        """
        parameter = self.parametrizations.weight.original
        (form,) = self.parametrizations.weight
        # torch's form of a square R is a matrix exponential
        if parameter.shape[0] == parameter.shape[1]:
            return self.weight.T
        E = torch.eye(*parameter.shape, dtype=parameter.dtype, device=parameter.device)
        V = parameter.tril(-1) + E
        gram = V.T @ V
        inverse_T = gram.triu(1) + (gram.diagonal() / 2).diag()
        Q = V @ torch.linalg.solve_triangular(inverse_T, V[: len(gram)].T, upper=True) - E
        R: Tensor = (form.base @ Q).T
        return R

    def restore(self, R: Tensor) -> None:
        """Make `R` the rows, bit for bit."""
        off = (R @ R.T - torch.eye(len(R))).abs().max().item()
        if off > ORTHONORMAL_TOLERANCE:
            fault = (
                f"R is not orthonormal (off by {off:.2g}), so it can be served but not trained "
                "further"
            )
            raise AdapterInvalid("to resume from", [fault])
        # Assigning completes R to a whole orthonormal base (width, width), with rounding; then R's
        # own bits go in. With the second step alone the rest of the base would not be orthogonal to
        # R, and training would bend R.
        # Contiguous as a fresh one is: products over other strides would differ in their last bits.
        self.weight = R.T.contiguous()
        self.parametrizations.weight[0].base[:, : len(R)] = R.T
