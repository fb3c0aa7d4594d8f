"""RMSNorm and rotary embeddings in few passes: equal to transformers' own, and only where they are
such.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from reft_serve.training.data.batching import collate
from reft_serve.training.model.cpu_fusion import fuse
from tests.support.engine.family_models import FAMILIES
from tests.support.training.models import RULE, edited, examples_of, learnt


def frozen(norm: Any) -> Any:
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.2, 1.5, len(norm.weight)))
    return norm.requires_grad_(False)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("shape", [(5, 24), (1, 0, 24), (2, 3, 4, 24)])
def test_answers_and_gradients_are_those_of_transformers(kind: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    theirs, ours = frozen(kind(24)).double(), frozen(kind(24))
    assert fuse(nn.Sequential(ours)) == 1
    h = (
        torch.randn(shape) * torch.logspace(-4, 3, shape[0])[(...,) + (None,) * (len(shape) - 1)]
    ).requires_grad_()
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
    others = nn.Sequential(
        frozen(Gemma2RMSNorm(8)), learning, half, nn.LayerNorm(8), nn.Linear(8, 8)
    )
    assert fuse(others) == 0
    assert not any("forward" in vars(module) for module in others)


def test_rotary_embeddings_and_their_gradients_are_those_of_transformers() -> None:
    torch.manual_seed(0)
    module = LlamaAttention(
        LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2), 0
    )
    assert fuse(module) == 1
    ours = module.forward.__globals__["apply_rotary_pos_emb"]
    assert ours is not apply_rotary_pos_emb is modeling_llama.apply_rotary_pos_emb
    q, k = (torch.randn(2, heads, 5, 8, requires_grad=True) for heads in (4, 2))
    exact = [each.detach().double().requires_grad_() for each in (q, k)]
    cos, sin = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    got, expected = ours(q, k, cos, sin), apply_rotary_pos_emb(*exact, cos.double(), sin.double())
    for mine, theirs, x, y in zip(got, expected, (q, k), exact, strict=True):
        grad = torch.randn_like(mine)
        mine.backward(grad)
        theirs.backward(grad.double())
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_joined_passes_change_no_answer_of_any_family(name: str, tmp_path: Path) -> None:
    FAMILIES[name].build(tmp_path)
    model, joined = edited(tmp_path, 1), edited(tmp_path, 1)
    neither = (
        "gpt2",
        "opt",
        "opt_350m",
        "bloom",
        "cohere",
        "gptj",
        "gpt_neox",
        "gpt_neox_sequential",
    )
    assert (fuse(joined.lm) == 0) == (name in neither)
    batch = collate(examples_of(model, 5), RULE, packed=False)
    expected, got = learnt(model, batch), learnt(joined, batch)
    largest = max(float(grad.abs().max()) for grad in expected[1])
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5 * largest)
