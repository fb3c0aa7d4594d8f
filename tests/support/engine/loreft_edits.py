"""Random LoReFT adapters of the golden Llama, and what they answer by hooks on Hugging Face's
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.directory import Adapter, publish
from reft_serve.adapters.manifest import InterventionSpec, Manifest
from reft_serve.interventions.kinds import Weights
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import Component
from tests.support.adapters.damage import MODEL

# Two ranks of a pipeline have layers 0 and 1, and 2 and 3.
EDITS: dict[str, list[tuple[int, Component]]] = {
    "first rank alone": [(0, "block_output"), (1, "mlp_output")],
    "second rank alone": [(2, "attention_output"), (3, "block_output")],
    "between the ranks, from below": [(1, "block_output")],
    "between the ranks, from above": [(2, "block_input")],
    "everywhere": [
        *((0, "block_input"), (1, "block_output"), (2, "block_input")),
        *((2, "mlp_output"), (3, "block_output")),
    ],
}


PROMPT = [1, *range(20, 50)]


def write_loreft(
    path: Path, places: Sequence[tuple[int, Component]], rule: PositionRule, seed: int
) -> Adapter:
    """Random loreft interventions of rank 4 at these places of the golden llama."""
    random = torch.Generator().manual_seed(seed)
    specs, weights = [], []
    for layer, component in places:
        R = torch.linalg.qr(torch.randn(64, 4, generator=random))[0].mT
        W, b = 0.3 * torch.randn(4, 64, generator=random), torch.randn(4, generator=random)
        specs.append(InterventionSpec(layer=layer, component=component, kind="loreft", rank=4))
        weights.append(Weights("loreft", b, R=R, W=W))
    manifest = Manifest(
        base_model=read_base_model(MODEL), interventions=tuple(specs), positions=rule
    )
    return publish(path, manifest, weights)


@torch.no_grad()
def by_hooks(adapter: Adapter | None) -> Tensor:
    """Log p(first answer to PROMPT) of Hugging Face's model in float64, with hooks that edit as the
    paper says.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64).eval()
    prefix, suffix = adapter.manifest.positions.indices(len(PROMPT)) if adapter else ([], [])
    rows = [*prefix, *suffix]
    for spec, weights in (
        zip(adapter.manifest.interventions, adapter.weights, strict=True) if adapter else ()
    ):
        _hook(model.model.layers[spec.layer], spec.component, weights, rows)
    return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, -1], -1)


def _hook(layer: nn.Module, component: str, weights: Weights, rows: list[int]) -> None:
    assert weights.R is not None
    assert weights.W is not None
    R, W, b = weights.R.double(), weights.W.double(), weights.b.double()

    def edit(hidden: Tensor) -> None:
        h = hidden[:, rows]
        hidden[:, rows] = h + (h @ (W - R).mT + b) @ R

    def after(_: nn.Module, __: Any, output: Any) -> None:
        edit(output[0] if isinstance(output, tuple) else output)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        edit(args[0] if args else kwargs["hidden_states"])

    if component == "block_input":
        layer.register_forward_pre_hook(before, with_kwargs=True)
    else:
        parts = {"mlp_output": "mlp", "attention_output": "self_attn"}
        module = layer.get_submodule(parts[component]) if component in parts else layer
        module.register_forward_hook(after)
