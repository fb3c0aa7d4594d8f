"""The LoRA half of a directory that holds both: PEFT's two files, checked without the base model.

Both halves act on a request: the LoRA inside the decoder layers, the edits on the stream that
leaves them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_safetensors
from torch import Tensor

from reft_serve.adapters.structure import LORA_CONFIG as CONFIG
from reft_serve.adapters.structure import LORA_NAME, MAX_CONFIG_BYTES, lora_faults, module_faults
from reft_serve.adapters.structure import LORA_TENSORS as TENSORS
from reft_serve.adapters.tensors import entries_of, parse_tensors
from reft_serve.errors import AdapterInvalid
from reft_serve.storage.files import read_regular_file

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

# As a training run names its parameters, with PEFT's adapter name before the last part.
_PARAMETER = re.compile(r"(base_model\.model\..{1,512}\.lora_[AB])\.[^.]{1,128}\.weight")


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """A sound LoRA. `files` are its bytes by file name; `rank` is the largest of its matrices,
    `parameters` their sum.
    """

    files: Mapping[str, bytes]
    rank: int
    parameters: int

    def misfits(self, modules: Mapping[str, tuple[int, int]]) -> list[str]:
        """Why it does not fit a base model with these linear modules: (inputs, outputs) of each by
        its path.
        """
        return module_faults(
            entries_of(parse_tensors(self.files[TENSORS], TENSORS, TENSORS)), modules
        )


def holds_lora(path: Path) -> bool:
    """True if a directory claims to hold a LoRA; its contents are not checked."""
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
    config = read_regular_file(path / CONFIG, MAX_CONFIG_BYTES, where)
    tensors = read_regular_file(path / TENSORS, max_bytes, where)
    return lora_of_files({CONFIG: config, TENSORS: tensors}, layers, where)


def lora_of_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], layers: int, where: str
) -> Lora:
    """A LoRA from PEFT's configuration and its tensors by PEFT's names in a file.

    Raises:
        AdapterInvalid: every fault found.
    """
    named = {name: tensor.contiguous() for name, tensor in tensors.items()}
    files = {
        CONFIG: json.dumps(dict(config), indent=2).encode() + b"\n",
        TENSORS: save_safetensors(named),
    }
    return lora_of_files(files, layers, where)


def lora_of_parameters(
    parameters: Mapping[str, Tensor], alpha: float, layers: int, where: str
) -> Lora:
    """A LoRA from the parameters of a PEFT model, as pyreft saves them: without their
    configuration.

    Args:
        parameters: by the names of `named_parameters`, such as `...o_proj.lora_A.default.weight`.
        alpha: PEFT's lora_alpha; the scale is alpha / rank.
        layers: decoder layers of the base model.
        where: the adapter that messages name.

    Raises:
        AdapterInvalid: every fault found.
    """
    named = {_PARAMETER.sub(r"\1.weight", name): tensor for name, tensor in parameters.items()}
    ranks = sorted(
        {tensor.shape[0] for name, tensor in named.items() if "lora_A" in name and tensor.ndim == 2}
    )
    if len(ranks) != 1:
        raise AdapterInvalid(
            where,
            [f"its LoRA has matrices of the ranks {ranks}: save it with PEFT, which records them"],
        )
    # Whole names: PEFT would put a module that is named by its end alone into every layer.
    modules = sorted({match[1] for name in named if (match := LORA_NAME.fullmatch(name))})
    config = {
        "peft_type": "LORA",
        "r": ranks[0],
        "lora_alpha": alpha,
        "target_modules": modules,
        "bias": "none",
    }
    return lora_of_tensors(config, named, layers, where)


def lora_of_files(files: Mapping[str, bytes], layers: int, where: str) -> Lora:
    """Check PEFT's two files, given by name.

    Raises:
        AdapterInvalid: every fault found.
    """
    tensors = parse_tensors(files[TENSORS], TENSORS, where)
    faults = lora_faults(files[CONFIG], entries_of(tensors), layers)
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            faults.append(f"{TENSORS}: {name[:120]!r} must hold finite floats")
    if faults:
        raise AdapterInvalid(where, faults)
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name)
    return Lora(files, rank, sum(tensor.numel() for tensor in tensors.values()))
