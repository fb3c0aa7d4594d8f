"""Base models with random weights and adapters with random weights, made on the spot in a
directory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from reft_serve.adapters.directory import publish
from reft_serve.adapters.manifest import BaseFacts, InterventionSpec, Manifest
from reft_serve.interventions.kinds import Weights
from reft_serve.interventions.positions import PositionRule

LORA_TARGETS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama shape. `dtype` as vLLM spells it."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int = 12
    ffn: int = 2048
    vocab: int = 32000
    context: int = 2048
    dtype: str = "bfloat16"

    @property
    def parameters(self) -> int:
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn) + self.vocab * self.hidden

    def write(self, path: Path) -> Path:
        """A model directory for `load_format="dummy"`."""
        path.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": self.dtype,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        (path / "config.json").write_text(json.dumps(config))
        return path


def reft_adapter(path: Path, shape: Shape, rank: int, positions: str, seed: int) -> Path:
    """An all-layer LoReFT adapter whose edits are about a tenth of a random hidden state."""
    generator = torch.Generator().manual_seed(seed)
    specs, weights = [], []
    for layer in range(shape.layers):
        specs.append(
            InterventionSpec(layer=layer, component="block_output", kind="loreft", rank=rank)
        )
        R = torch.linalg.qr(torch.randn(shape.hidden, rank, generator=generator))[0].T.contiguous()
        W = R + 0.02 * torch.randn(rank, shape.hidden, generator=generator)
        weights.append(Weights("loreft", R=R, W=W, b=0.02 * torch.randn(rank, generator=generator)))
    base = BaseFacts(
        name="random",
        architecture="LlamaForCausalLM",
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
    )
    publish(
        path,
        Manifest(base_model=base, interventions=tuple(specs), positions=PositionRule(positions)),
        weights,
    )
    return path


def lora_adapter(path: Path, shape: Shape, rank: int, seed: int) -> Path:
    """A LoRA of PEFT's format on every linear layer."""
    generator = torch.Generator().manual_seed(seed)
    head = shape.hidden // shape.heads
    widths = {
        "q_proj": (shape.hidden, shape.heads * head),
        "k_proj": (shape.hidden, shape.kv_heads * head),
        "v_proj": (shape.hidden, shape.kv_heads * head),
        "o_proj": (shape.heads * head, shape.hidden),
        "gate_proj": (shape.hidden, shape.ffn),
        "up_proj": (shape.hidden, shape.ffn),
        "down_proj": (shape.ffn, shape.hidden),
    }
    tensors = {}
    for layer in range(shape.layers):
        for block, names in LORA_TARGETS.items():
            for name in names:
                d_in, d_out = widths[name]
                key = f"base_model.model.model.layers.{layer}.{block}.{name}"
                tensors[f"{key}.lora_A.weight"] = (
                    0.02 * torch.randn(rank, d_in, generator=generator)
                ).bfloat16()
                tensors[f"{key}.lora_B.weight"] = (
                    0.02 * torch.randn(d_out, rank, generator=generator)
                ).bfloat16()
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    targets = [name for names in LORA_TARGETS.values() for name in names]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
