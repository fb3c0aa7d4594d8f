"""Checkpoints: each a directory that can be served, with what a run needs to go on from it bit for bit.

transformers writes the state of optimiser, schedule and random generators file by file, so a checkpoint counts only once
its last file, the seal, is there. What a killed process left without one is swept away.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reft_serve.adapters.directory import CONFIG, TENSORS
from reft_serve.adapters.files import sync_path
from reft_serve.adapters.lora import CONFIG as LORA_CONFIG
from reft_serve.adapters.lora import TENSORS as LORA_TENSORS

__all__ = ["SERVED", "load_parameters", "newest", "rotate", "save_parameters", "seal", "sealed", "sweep", "sync"]

_NAME = re.compile(r"checkpoint-(\d+)")
_PARAMETERS = "parameters.safetensors"
_SEAL = "complete"
# The files of a checkpoint that are the adapter.
SERVED = (CONFIG, TENSORS, LORA_CONFIG, LORA_TENSORS)


def sealed(folder: Path) -> dict[int, Path]:
    """The whole checkpoints in a run's folder, by their step, ascending."""
    return {step: path for step, path in sorted(_all(folder).items()) if (path / _SEAL).exists()}


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint; None where there is none."""
    return next(reversed(sealed(folder).values()), None)


def sweep(folder: Path) -> None:
    """Remove what is not a whole checkpoint."""
    for path in _all(folder).values():
        if not (path / _SEAL).exists():
            shutil.rmtree(path)


def seal(path: Path) -> None:
    """Say that everything is written, once it is on the disk."""
    sync(path)
    with open(path / _SEAL, "xb") as marker:
        os.fsync(marker.fileno())
    sync_path(path)


def rotate(folder: Path, keep: int, best: int | None) -> None:
    """Keep the last `keep` whole checkpoints and the one of step `best`."""
    for step, path in list(sealed(folder).items())[:-keep]:
        if step != best:
            # First the seal: a half-removed checkpoint must not count.
            (path / _SEAL).unlink()
            shutil.rmtree(path)


def save_parameters(path: Path, model: nn.Module) -> None:
    """Write what learns, and what it is a function of (the rotations' fixed bases), exactly."""
    save_file({name: tensor.contiguous() for name, tensor in _own(model).items()}, path / _PARAMETERS)


def load_parameters(path: Path, model: nn.Module) -> None:
    """Read what `save_parameters` wrote."""
    saved, own = load_file(path / _PARAMETERS), _own(model)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _own(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, and every buffer of a module that has some (a parametrization's base)."""
    learns = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return learns | {name: buffer for name, buffer in model.named_buffers() if ".parametrizations." in name}


def _all(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    return {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()}


def sync(folder: Path) -> None:
    """Have a directory and its files on the disk."""
    for file in folder.iterdir():
        sync_path(file)
    sync_path(folder)
