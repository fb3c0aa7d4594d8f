"""This process among those of a run: one, or several under `accelerate launch` or `torchrun`."""

from __future__ import annotations

import torch
from accelerate import PartialState  # type: ignore[import-untyped]

__all__ = ["this_process"]


def this_process() -> PartialState:
    """Accelerate's state of this process, with processes joined over gloo where there is no accelerator."""
    return PartialState(cpu=not torch.accelerator.is_available())
