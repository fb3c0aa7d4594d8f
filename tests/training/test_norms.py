"""RMSNorm in few passes: equal to transformers' own, and only where it is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from reft_serve.training.norms import join_passes


def frozen(norm: Any) -> Any:
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.2, 1.5, len(norm.weight)))
    return norm.requires_grad_(False)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("shape", [(5, 24), (1, 0, 24), (2, 3, 4, 24)])
def test_answers_and_gradients_are_those_of_transformers(kind: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    theirs, ours = frozen(kind(24)).double(), frozen(kind(24))
    assert join_passes(nn.Sequential(ours)) == 1
    h = (torch.randn(shape) * torch.logspace(-4, 3, shape[0])[(...,) + (None,) * (len(shape) - 1)]).requires_grad_()
    exact = h.detach().double().requires_grad_()
    grad = torch.randn(shape)
    out, expected = ours(h), theirs(exact)
    out.backward(grad)
    expected.backward(grad.double())
    assert h.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=1e-6)
    # Where a token's entries nearly cancel, what is left is as uncertain as they were large.
    largest = exact.grad.abs().amax(-1, keepdim=True) if exact.grad.numel() else exact.grad
    assert ((h.grad - exact.grad).abs() <= 1e-5 * largest).all()


def test_other_norms_are_left_as_they_are() -> None:
    learning, half = LlamaRMSNorm(8), frozen(LlamaRMSNorm(8)).bfloat16()
    others = nn.Sequential(frozen(Gemma2RMSNorm(8)), learning, half, nn.LayerNorm(8), nn.Linear(8, 8))
    assert join_passes(others) == 0
    assert not any("forward" in vars(module) for module in others)
