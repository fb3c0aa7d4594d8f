"""The custom op that a wrapped layer calls, and the per-process state behind it.

The op is opaque to torch.compile and changes its tensors in place. In a step without edited rows it
returns at once; on CUDA the graph captured for "no adapter" holds no launch of the op at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.library import Library

from reft_serve.interventions import batched
from reft_serve.interventions.batched import TILE, Tiles, UnitPool

__all__ = ["Edits", "attach_edits"]


@dataclass(slots=True, eq=False)
class Edits:
    """Edits of the current step.

    `units_of_LCS` is int32 over (place, pass, key). On a GPU the tiles lie in buffers that captured
    graphs read, with the number of live tiles in `count`; on a CPU they are the step's own tensors.
    `bodies` counts the op's work as the host sees it: on a CPU every edit of a place, on a GPU the
    launches outside replayed graphs.
    """

    pool: UnitPool
    units_of_LCS: Tensor
    max_tokens: int
    active: bool = False
    bodies: int = 0
    _tiles: Tiles | None = None
    _buffers: Tiles | None = field(init=False, default=None)
    _count: Tensor | None = field(init=False, default=None)
    _counted: bool = False
    _whole_grid: bool = False

    def __post_init__(self) -> None:
        device = self.pool.A_UPD.device
        if device.type == "cpu":
            return
        self._buffers = Tiles(
            torch.full((self.max_tokens, TILE), -1, dtype=torch.int32, device=device),
            torch.zeros(self.max_tokens, dtype=torch.int32, device=device),
            torch.zeros(self.max_tokens, TILE, dtype=torch.float32, device=device),
        )
        self._count = torch.zeros(1, dtype=torch.int32, device=device)

    def clear(self) -> None:
        """No row is edited from here on, not even by a captured graph with launches of the op, as a
        step of a LoRA replays.
        """
        if self._counted and self._count is not None:
            self._count.zero_()
        self.active = self._counted = False

    def set_rows(
        self, row_T: NDArray[np.int32], key_T: NDArray[np.int32], scale_T: NDArray[np.float32]
    ) -> None:
        """Edit these rows in the coming step (at least one)."""
        host = Tiles(*(torch.from_numpy(part) for part in batched.tile_rows(row_T, key_T, scale_T)))
        if self._buffers is not None and self._count is not None:
            live = len(host)
            for buffer, part in zip(_parts(self._buffers), _parts(host), strict=True):
                # A fresh pinned tensor each time: the step before may still be copying from its
                # own.
                buffer[:live].copy_(part.pin_memory(), non_blocking=True)
            self._count.copy_(
                torch.tensor([live], dtype=torch.int32).pin_memory(), non_blocking=True
            )
            host = Tiles(*(buffer[:live] for buffer in _parts(self._buffers)))
            self._counted = True
        self._tiles = host
        self.active = True
        self._whole_grid = False

    def set_dummy(self) -> None:
        """Prepare for warm-up and graph capture: launch for any number of tiles, with none live."""
        if self._buffers is not None and self._count is not None:
            self._count.zero_()
            self._tiles = self._buffers
            self.active = True
            self._counted = False
            self._whole_grid = True

    def apply(self, hidden_ND: Tensor, residual_ND: Tensor | None, place: int) -> None:
        """Edit the step's rows of one place, in place."""
        self.bodies += 1
        assert self._tiles is not None
        units_of_CS = self.units_of_LCS[place]
        if self._count is None:
            batched.edit_tiles(hidden_ND, residual_ND, self._tiles, self.pool, units_of_CS)
            return
        from reft_serve.interventions import fused  # Triton: not on every machine

        # In a captured graph the count is read on the device; a step of N tokens has at most N
        # tiles.
        padded = self._whole_grid or torch.cuda.is_current_stream_capturing()
        tiles = self._buffers if padded and self._buffers is not None else self._tiles
        grid = min(hidden_ND.shape[0], self.max_tokens) if padded else len(tiles)
        fused.edit_tiles(
            hidden_ND, residual_ND, tiles, self.pool, units_of_CS, count=self._count, grid=grid
        )


def _parts(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    return tiles.rows_KM, tiles.key_K, tiles.scale_KM


_ENGINES: list[Edits] = []


def attach_edits(edits: Edits) -> int:
    """Register the state and return the number that the op finds it by."""
    _ENGINES.append(edits)
    return len(_ENGINES) - 1


def _edit(hidden: Tensor, engine: int, place: int) -> None:
    edits = _ENGINES[engine]
    if edits.active:
        edits.apply(hidden, None, place)


def _edit_stream(hidden: Tensor, residual: Tensor, engine: int, place: int) -> None:
    edits = _ENGINES[engine]
    if edits.active:
        edits.apply(hidden, residual, place)


def _define() -> Any:
    library: Any = Library("reft_serve", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("edit(Tensor(a!) hidden, int engine, int place) -> ()")
    library.define(
        "edit_stream(Tensor(a!) hidden, Tensor(b!) residual, int engine, int place) -> ()"
    )
    for name, function in (("edit", _edit), ("edit_stream", _edit_stream)):
        for key in ("CPU", "CUDA"):
            library.impl(name, function, key)
        library.impl(name, lambda *_: None, "Meta")
    return library


_LIBRARY = _define()
