"""This process among those of a run: one, or several under `accelerate launch` or `torchrun`."""

from __future__ import annotations

import ctypes
from typing import TypeVar

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]

__all__ = ["keep_freed_memory", "of_main_process", "this_process"]

_T = TypeVar("_T")

# mallopt(3), malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def this_process() -> PartialState:
    """Accelerate's state of this process, with processes joined over gloo if there is no
    accelerator.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def of_main_process(value: _T) -> _T:
    """The main process's value, in every process of the run."""
    held = [value]
    if this_process().num_processes > 1:
        broadcast_object_list(held)
    return held[0]


def keep_freed_memory() -> None:
    """Have the C library keep what tensors in main memory free, from now on and in the whole
    process.

    A step of training asks for as much as the one before had, and would get pages that the system
    clears first: up to a tenth of a small model's step. Nothing happens where the C library has no
    `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        # Older ones refuse a threshold above 32 MiB.
        mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
