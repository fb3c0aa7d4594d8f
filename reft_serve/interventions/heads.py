"""The maths of a classifier head. Letters: N texts, D hidden width, C outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from reft_serve.interventions.activations import activate

__all__ = ["Head", "scores_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The tensors of a head, float32: `out` (C, D), `dense` (D, D) or None, and `activation`, the
    code that follows it.
    """

    out: Tensor
    out_bias: Tensor | None = None
    dense: Tensor | None = None
    dense_bias: Tensor | None = None
    activation: int = 0

    @classmethod
    def of(cls, named: Mapping[str, Tensor], activation: int) -> Head:
        """From tensors named `out.weight`, `out.bias`, `dense.weight` and `dense.bias`."""
        bias, dense, dense_bias = (
            named.get(name) for name in ("out.bias", "dense.weight", "dense.bias")
        )
        return cls(named["out.weight"], bias, dense, dense_bias, activation)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by the names of `of`."""
        named = {
            "out.weight": self.out,
            "out.bias": self.out_bias,
            "dense.weight": self.dense,
            "dense.bias": self.dense_bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device) -> Head:
        """The head on a device."""
        return Head.of(
            {name: tensor.to(device) for name, tensor in self.tensors().items()}, self.activation
        )

    def logits(self, h_ND: Tensor) -> Tensor:
        """(N, C) in float32."""
        h_ND = h_ND.float()
        if self.dense is not None:
            h_ND = activate(linear(h_ND, self.dense, self.dense_bias), self.activation)
        return linear(h_ND, self.out, self.out_bias)


def scores_of(logits_NC: Tensor, problem_type: str) -> Tensor:
    """What is answered for logits: their softmax, the sigmoid of each, or themselves in a
    regression.
    """
    if problem_type == "single_label_classification":
        return logits_NC.softmax(dim=-1)
    return logits_NC.sigmoid() if problem_type == "multi_label_classification" else logits_NC
