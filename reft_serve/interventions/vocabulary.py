"""The words of ReFT that both the maths and a manifest use: kinds, components, activations. No
torch.
"""

from __future__ import annotations

from typing import Literal, get_args

__all__ = [
    "ACTIVATION_CODES",
    "COMPONENTS",
    "KINDS",
    "LINEAR",
    "MAX_LABELS",
    "ORTHONORMAL_TOLERANCE",
    "Component",
    "Kind",
    "ProblemType",
    "Read",
    "has_activation",
    "optional_tensors",
    "required_tensors",
    "unit_rank",
]

Kind = Literal["loreft", "noreft", "consreft", "lobireft", "direft", "nodireft"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Component = Literal["block_output", "block_input", "mlp_output", "attention_output"]
COMPONENTS: tuple[Component, ...] = get_args(Component)

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
"""Of a classifier head, in transformers' words."""
Read = Literal["first", "last", "mean"]
"""The token whose last hidden state a head takes, or the mean of all."""
MAX_LABELS = 4096

# The names that pyreft takes as `act_fn` (transformers.activations.ACT2FN); names that mean one
# function share a code. prelu and xielu are left out: they carry learned parameters that pyreft
# never saves.
LINEAR = 0
ORTHONORMAL_TOLERANCE = 1e-3
"""Largest deviation of an element of R R^T from the identity."""
ACTIVATION_CODES: dict[str, int] = {
    "linear": LINEAR,
    "relu": 1,
    "tanh": 2,
    "sigmoid": 3,
    "silu": 4,
    "swish": 4,
    "gelu": 5,
    "gelu_python": 5,
    "gelu_new": 6,
    "gelu_pytorch_tanh": 6,
    "gelu_python_tanh": 6,
    "gelu_accurate": 6,
    "gelu_fast": 6,
    "gelu_10": 7,
    "quick_gelu": 8,
    "hardswish": 9,
    "laplace": 10,
    "leaky_relu": 11,
    "mish": 12,
    "relu2": 13,
    "relu6": 14,
    "sqrtsoftplus": 15,
}

ORTHONORMAL = frozenset({"loreft", "consreft", "lobireft", "direft"})
SUBTRACTS = frozenset({"loreft", "noreft"})
_NO_SOURCE = frozenset({"consreft", "lobireft"})


def required_tensors(kind: Kind) -> tuple[str, ...]:
    """The tensors that an intervention of this kind must have."""
    projection = "R" if kind in ORTHONORMAL else "W2"
    return (projection, "b") if kind in _NO_SOURCE else (projection, "W", "b")


def optional_tensors(kind: Kind) -> tuple[str, ...]:
    """The tensors that it may have: b2 where pyreft was given `add_bias=True`."""
    return () if kind in ORTHONORMAL else ("b2",)


def has_activation(kind: Kind) -> bool:
    """True if the kind applies `act_fn`: all but consreft and lobireft."""
    return kind not in _NO_SOURCE


def unit_rank(kind: Kind, rank: int, activation: str) -> int:
    """Rows of the folded unit: twice the rank where an activation keeps W apart from the subtracted
    projection.
    """
    return 2 * rank if kind in SUBTRACTS and ACTIVATION_CODES[activation] != LINEAR else rank
