"""Exact reading and writing of the trained parameters: our part of a checkpoint, next to
transformers' own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["load_parameters", "save_parameters"]

_PARAMETERS = "parameters.safetensors"


def save_parameters(path: Path, model: nn.Module) -> None:
    """Write what learns, and what it is a function of (the rotations' fixed bases), exactly."""
    save_file(
        {name: tensor.contiguous() for name, tensor in _own(model).items()}, path / _PARAMETERS
    )


def load_parameters(path: Path, model: nn.Module) -> None:
    """Read what `save_parameters` wrote."""
    saved = load_file(path / _PARAMETERS)
    own = _own(model)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _own(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, and every buffer of a module that has some (a parametrization's
    base).
    """
    learns = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return learns | {
        name: buffer for name, buffer in model.named_buffers() if ".parametrizations." in name
    }
