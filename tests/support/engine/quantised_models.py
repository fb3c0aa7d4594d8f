"""Checkpoints of a quantised Llama, written tensor by tensor, and the same model in plain torch.

Formats: compressed-tensors "int-quantized", "float-quantized" and "pack-quantized" (compressed_tensors 0.17), and AWQ's
GEMM layout (AutoAWQ `awq/utils/packing_utils.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GROUP = 32
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Quantised:
    """A linear layer at rest and in use: `tensors` are the checkpoint's, by suffix; `weight` is what they mean, float32;
    `quantise` is what happens to its input.
    """

    tensors: Mapping[str, Tensor]
    weight: Tensor
    quantise: Callable[[Tensor], Tensor] = lambda x: x


@dataclass(frozen=True)
class Scheme:
    """A way to quantise, with the checkpoint's `quantization_config`."""

    config: Mapping[str, Any]
    linear: Callable[[Tensor], Quantised]

    def write(self, model: Any, folder: Path) -> None:
        """Quantise the linear layers of the checkpoint in `folder`, and those of the model it was saved from."""
        saved = load_file(folder / "model.safetensors")
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                quantised = self.linear(saved.pop(f"{name}.weight"))
                saved |= {
                    f"{name}.{suffix}": tensor.contiguous()
                    for suffix, tensor in quantised.tensors.items()
                }
                model.set_submodule(name, QuantisedLinear(quantised))
        save_file(saved, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(config | {"quantization_config": self.config})
        )


class QuantisedLinear(nn.Module):
    """What a kernel computes: products of quantised inputs are exact there, so they are float32 here."""

    def __init__(self, quantised: Quantised) -> None:
        super().__init__()
        self.quantised = quantised

    def forward(self, x: Tensor) -> Tensor:
        q = self.quantised.quantise(x)
        return (q @ self.quantised.weight.to(q.dtype).T).to(x.dtype)


def _per_token(x: Tensor, largest: float, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Dynamic symmetric quantisation of each token, and back."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-10) / largest
    return rounded(x / scale) * scale


def _int8(weight: Tensor) -> Quantised:
    scale = weight.abs().amax(1, keepdim=True) / 127
    whole = (weight / scale).round()
    tensors = {"weight": whole.to(torch.int8), "weight_scale": scale}
    return Quantised(tensors, whole * scale, lambda x: _per_token(x, 127.0, torch.round))


def _fp8(weight: Tensor) -> Quantised:
    def rounded(x: Tensor) -> Tensor:
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)

    scale = weight.abs().amax(1, keepdim=True) / 448
    eighth = rounded(weight / scale)
    tensors = {"weight": eighth.to(torch.float8_e4m3fn), "weight_scale": scale}
    return Quantised(tensors, eighth * scale, lambda x: _per_token(x, 448.0, rounded))


def _fp8_weights(weight: Tensor) -> Quantised:
    return replace(_fp8(weight), quantise=lambda x: x)


def _grouped(weight: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """(whole numbers (N, K), scales (N, K / GROUP) that bfloat16 and float16 both hold exactly)."""
    groups = weight.view(len(weight), -1, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / high).bfloat16().float()
    return (groups / scale).round().clamp(low, high).view_as(weight), scale.squeeze(-1)


def _packed(nibbles: Tensor) -> Tensor:
    """Eight numbers of 0..15 along the last axis in each int32, the first in the lowest bits."""
    shifted = nibbles.long().unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)
    return shifted.sum(-1).to(torch.int32)


def _int4(weight: Tensor) -> Quantised:
    whole, scale = _grouped(weight, -8, 7)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    tensors = {"weight_packed": _packed(whole + 8), "weight_scale": scale, "weight_shape": shape}
    return Quantised(tensors, whole * scale.repeat_interleave(GROUP, 1))


def _awq(weight: Tensor) -> Quantised:
    # A zero point of its own for each group, so that a mistake in their order shows.
    whole, scale = _grouped(weight, -4, 5)
    zero = 4 + torch.arange(scale.numel()).view_as(scale) % 7
    stored = (whole + zero.repeat_interleave(GROUP, 1)).T  # (K, N)
    tensors = {
        "qweight": _packed(stored.unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2)),
        "qzeros": _packed(zero.T.unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2)),
        "scales": scale.T.half(),
    }
    return Quantised(tensors, whole * scale.repeat_interleave(GROUP, 1))


def _compressed(
    form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None
) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": inputs,
    }
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }  # fmt: skip


def _dynamic(kind: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


SCHEMES = {
    "int8": Scheme(
        _compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, _dynamic("int")), _int8
    ),
    "int4": Scheme(
        _compressed(
            "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}, inputs=None
        ),
        _int4,
    ),
    "fp8": Scheme(
        _compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, _dynamic("float")), _fp8
    ),
    "fp8_weights": Scheme(
        _compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, inputs=None), _fp8_weights
    ),
    "awq": Scheme(
        {
            "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        },
        _awq,
    ),
}  # fmt: skip
