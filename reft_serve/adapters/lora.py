"""The LoRA half of a directory that holds both: PEFT's two files, checked as far as they alone can tell.

Both halves act on a request: the LoRA inside the decoder layers, the edits on the stream that leaves them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from reft_serve.adapters.files import read_plain
from reft_serve.errors import AdapterInvalid

__all__ = [
    "CONFIG",
    "TENSORS",
    "Lora",
    "holds_lora",
    "lora_of_files",
    "lora_of_parameters",
    "lora_of_tensors",
    "read_lora",
]

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 4 << 20
_NAME = re.compile(r"base_model\.model\.(.{1,512})\.lora_([AB])\.weight")
# As a training run names its parameters, with PEFT's adapter name before the last part.
_PARAMETER = re.compile(r"(base_model\.model\..{1,512}\.lora_[AB])\.[^.]{1,128}\.weight")
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d{1,6})\.")


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """A sound LoRA. `files` are its bytes by file name; `rank` is the largest of its matrices, `parameters` their sum."""

    files: Mapping[str, bytes]
    rank: int
    parameters: int


def holds_lora(path: Path) -> bool:
    """Whether a directory claims to hold a LoRA; says nothing of its soundness."""
    return any(os.path.lexists(path / name) for name in (CONFIG, TENSORS))


def read_lora(path: Path, layers: int, max_bytes: int) -> Lora:
    """Read and check PEFT's files in a directory.

    Args:
        path: the directory.
        layers: decoder layers of the base model.
        max_bytes: largest tensor file to take into memory.

    Raises:
        AdapterInvalid: every fault found.
    """
    where = str(path)
    config = read_plain(path / CONFIG, _MAX_CONFIG_BYTES, where)
    tensors = read_plain(path / TENSORS, max_bytes, where)
    return lora_of_files({CONFIG: config, TENSORS: tensors}, layers, where)


def lora_of_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor], layers: int, where: str) -> Lora:
    """A LoRA from PEFT's configuration and its tensors by PEFT's names in a file.

    Raises:
        AdapterInvalid: every fault found.
    """
    named = {name: tensor.contiguous() for name, tensor in tensors.items()}
    files = {CONFIG: json.dumps(dict(config), indent=2).encode() + b"\n", TENSORS: save_safetensors(named)}
    return lora_of_files(files, layers, where)


def lora_of_parameters(parameters: Mapping[str, Tensor], alpha: float, layers: int, where: str) -> Lora:
    """A LoRA from the parameters of a PEFT model, as pyreft saves them: without their configuration.

    Args:
        parameters: by the names of `named_parameters`, such as `...o_proj.lora_A.default.weight`.
        alpha: PEFT's lora_alpha; the scale is alpha / rank.
        layers: decoder layers of the base model.
        where: the adapter that messages name.

    Raises:
        AdapterInvalid: every fault found.
    """
    named = {_PARAMETER.sub(r"\1.weight", name): tensor for name, tensor in parameters.items()}
    ranks = sorted({tensor.shape[0] for name, tensor in named.items() if "lora_A" in name and tensor.ndim == 2})
    if len(ranks) != 1:
        raise AdapterInvalid(
            where, [f"its LoRA has matrices of the ranks {ranks}: save it with PEFT, which records them"]
        )
    # Whole names: PEFT would put a module that is named by its end alone into every layer.
    modules = sorted({match[1] for name in named if (match := _NAME.fullmatch(name))})
    config = {"peft_type": "LORA", "r": ranks[0], "lora_alpha": alpha, "target_modules": modules, "bias": "none"}
    return lora_of_tensors(config, named, layers, where)


def lora_of_files(files: Mapping[str, bytes], layers: int, where: str) -> Lora:
    """Check PEFT's two files, given by name.

    Raises:
        AdapterInvalid: every fault found.
    """
    faults = _config_faults(files[CONFIG])
    try:
        tensors = load_safetensors(files[TENSORS])
    except (SafetensorError, ValueError, KeyError, OverflowError, RuntimeError) as exc:
        short = re.sub(r"\s+", " ", str(exc))[:200]
        raise AdapterInvalid(where, [*faults, f"{TENSORS} is damaged or not a safetensors file ({short})"]) from exc
    faults += _tensor_faults(tensors, layers)
    if faults:
        raise AdapterInvalid(where, faults)
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name)
    return Lora(files, rank, sum(tensor.numel() for tensor in tensors.values()))


def _config_faults(content: bytes) -> list[str]:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as exc:
        return [f"{CONFIG} is not JSON: {str(exc)[:200]}"]
    if not isinstance(config, dict):
        return [f"{CONFIG} is not a JSON object"]
    faults = []
    if config.get("peft_type") != "LORA":
        faults.append(f"{CONFIG}: peft_type is {str(config.get('peft_type'))[:40]!r}; only LORA is served beside ReFT")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        faults.append(f"{CONFIG}: r must be a whole number from 1, and it is {str(rank)[:40]}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        faults.append(f"{CONFIG}: lora_alpha must be a number, and it is {str(alpha)[:40]}")
    return faults


def _tensor_faults(tensors: Mapping[str, Tensor], layers: int) -> list[str]:
    if not tensors:
        return [f"{TENSORS} holds no tensors"]
    faults, pairs = [], dict[str, dict[str, Tensor]]()
    for name, tensor in sorted(tensors.items()):
        match = _NAME.fullmatch(name)
        if match is None:
            faults.append(f"{TENSORS}: {name[:120]!r} is not a matrix of a LoRA on a linear layer")
            continue
        pairs.setdefault(match[1], {})[match[2]] = tensor
        layer = _LAYER.search(f".{match[1]}.")
        if layer and int(layer[1]) >= layers:
            faults.append(f"{TENSORS}: {name[:120]!r} is for layer {layer[1]} and the base model has {layers}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            faults.append(f"{TENSORS}: {name[:120]!r} must hold finite floats")
    for module, pair in pairs.items():
        if len(pair) < 2:
            faults.append(f"{TENSORS}: {module[:120]!r} has lora_{next(iter(pair))} alone")
        elif pair["A"].ndim != 2 or pair["B"].ndim != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = f"{tuple(pair['A'].shape)} and {tuple(pair['B'].shape)}"
            faults.append(f"{TENSORS}: A and B of {module[:120]!r} have the shapes {shapes}, which do not meet")
    return faults
