"""The six kinds of intervention, their weights, the reference edit, and the one form that the
engine runs.

Kind names are pyreft's (`pyreft.interventions`); the paper's DiReFT (arXiv 2404.03592, section 3.2)
is `nodireft` here. Letters: D hidden width, R rank of the intervention, T rows (tokens). h is a row
vector; R has orthonormal rows.

========== =============================================== =====================
`loreft`   h + (act(W h + b) - R h) R                      R W b
`noreft`   h + (act(W h + b) - (W2 h + b2)) W2             W2 W b [b2]
`consreft` h + (b - R h) R                                 R b
`lobireft` h + b R                                         R b
`direft`   h + act(W h + b) R                              R W b
`nodireft` h + act(W h + b) W2                             W2 W b [b2, unused]
========== =============================================== =====================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from reft_serve.interventions.activations import activate
from reft_serve.interventions.vocabulary import (
    ACTIVATION_CODES,
    LINEAR,
    ORTHONORMAL,
    SUBTRACTS,
    Kind,
)

__all__ = ["Unit", "Weights", "edit", "fold"]


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The tensors of one intervention. Matrices are (R, D), vectors (R,); R, W2 and W are
    projections, b and b2 biases.

    dtypes follow pyreft: the orthonormal R, and b of consreft and lobireft, are float32; the others
    have the dtype the adapter was trained in.
    """

    kind: Kind
    b: Tensor
    R: Tensor | None = None
    W: Tensor | None = None
    W2: Tensor | None = None
    b2: Tensor | None = None
    activation: str = "linear"

    @classmethod
    def of(cls, kind: Kind, tensors: Mapping[str, Tensor], activation: str = "linear") -> Weights:
        """Build from tensors named as in `vocabulary.required_tensors`."""
        return cls(kind=kind, activation=activation, **tensors)

    @property
    def projection(self) -> Tensor:
        """The (R, D) matrix that the edit is expanded with: R, or W2 for noreft and nodireft."""
        matrix = self.R if self.kind in ORTHONORMAL else self.W2
        assert matrix is not None
        return matrix

    @property
    def rank(self) -> int:
        return self.projection.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        named = {"R": self.R, "W": self.W, "b": self.b, "W2": self.W2, "b2": self.b2}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def edit(h_TD: Tensor, weights: Weights) -> Tensor:
    """The reference edit of rows `h_TD`, with pyreft's casts, in h's dtype.

    Source: `pyreft/interventions.py`, `forward` of each class. Where pyreft refuses a mix of dtypes
    (a base and an adapter of different dtype), h is cast to the adapter's dtype first.
    """
    return _EDITS[weights.kind](h_TD, weights).to(h_TD.dtype)


def _source(h: Tensor, w: Weights) -> Tensor:
    assert w.W is not None
    return activate(linear(h.to(w.W.dtype), w.W, w.b), ACTIVATION_CODES[w.activation])


def _project(h: Tensor, w: Weights) -> Tensor:
    return h.to(w.projection.dtype) @ w.projection.T


def _loreft(h: Tensor, w: Weights) -> Tensor:
    return h + (_source(h, w) - _project(h, w)) @ w.projection


def _noreft(h: Tensor, w: Weights) -> Tensor:
    return h + (_source(h, w) - linear(h.to(w.projection.dtype), w.projection, w.b2)) @ w.projection


def _consreft(h: Tensor, w: Weights) -> Tensor:
    return h + (w.b - _project(h, w)) @ w.projection


def _lobireft(h: Tensor, w: Weights) -> Tensor:
    return h + w.b @ w.projection


def _direft(h: Tensor, w: Weights) -> Tensor:
    return h + _source(h, w).to(w.projection.dtype) @ w.projection


_EDITS: dict[Kind, Callable[[Tensor, Weights], Tensor]] = {
    "loreft": _loreft,
    "noreft": _noreft,
    "consreft": _consreft,
    "lobireft": _lobireft,
    "direft": _direft,
    "nodireft": _direft,
}


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """One intervention as the engine runs it: h + z B with z = A h + b, the first `activated`
    entries of z through an activation. A and B are (P, D), b is (P,), all of one dtype; P is
    `vocabulary.unit_rank`.

    This one form holds all six kinds: a linear loreft or noreft is A = W - R, one that has an
    activation stacks [W; R] over [R; -R], a lobireft has A = 0.
    """

    A: Tensor
    b: Tensor
    B: Tensor
    activation: int = LINEAR
    activated: int = 0

    @property
    def does_nothing(self) -> bool:
        """True if the unit leaves every h unchanged."""
        if not self.B.any():
            return True
        if self.A.any():
            return False
        z = self.b.clone()
        z[: self.activated] = activate(z[: self.activated], self.activation)
        return not (z @ self.B).any()


def fold(weights: Weights, dtype: torch.dtype = torch.float32) -> Unit:
    """The engine's form of one intervention, in `dtype`: float32 for serving, float64 for a
    reference.
    """
    w = {name: tensor.to(dtype) for name, tensor in weights.tensors().items()}
    P = weights.projection.to(dtype)
    b = w["b"]
    kind = weights.kind
    code = ACTIVATION_CODES[weights.activation]
    if kind == "lobireft":
        return Unit(torch.zeros_like(P), b, P)
    if kind == "consreft":
        return Unit(-P, b, P)
    if kind not in SUBTRACTS:
        return Unit(w["W"], b, P, code, len(b))
    b2 = w.get("b2", torch.zeros_like(b))
    if code == LINEAR:
        return Unit(w["W"] - P, b - b2, P)
    return Unit(torch.cat([w["W"], P]), torch.cat([b, b2]), torch.cat([P, -P]), code, len(b))
