"""LoRAs by PEFT's format for tests/golden/models/tiny-llama."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from reft_serve.adapters.lora import CONFIG, TENSORS

SCALE = 2.0


def write_lora(path: Path, seed: int = 5) -> dict[str, Tensor]:
    """A random LoRA on o_proj and down_proj of layers 1 and 2, alone or beside an adapter; returns
    its tensors.
    """
    random, tensors = torch.Generator().manual_seed(seed), {}
    for layer in (1, 2):
        for name, width in (("self_attn.o_proj", 64), ("mlp.down_proj", 128)):
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = 0.3 * torch.randn(8, width, generator=random)
            tensors[f"{key}.lora_B.weight"] = 0.3 * torch.randn(64, 8, generator=random)
    path.mkdir(exist_ok=True)
    save_file(tensors, path / TENSORS)
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 8 * SCALE,
        "target_modules": ["o_proj", "down_proj"],
    }
    (path / CONFIG).write_text(json.dumps(config))
    return tensors
