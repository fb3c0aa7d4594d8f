"""Many interventions over the rows of one step: the pool that holds them, the tiles that group
rows, the edit in torch.

Letters: N tokens of the step, T edited rows, K tiles, M rows of a tile, U units of the pool, P rows
of a unit (the largest rank the pool takes), D hidden width, C passes (interventions that follow one
another at one place), S keys.

A *key* is an adapter's slot and a part of its position rule (`slot * 2 + part`). Rows that share a
key share every intervention, so they are tiled together once per step; each place then looks up
`units_of_CS[pass, key]`, 0 for none. `fused.edit_tiles` is the same function as one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reft_serve.interventions.activations import activate
from reft_serve.interventions.kinds import Unit
from reft_serve.interventions.vocabulary import LINEAR

__all__ = ["TILE", "Tiles", "UnitPool", "edit_tiles", "tile_rows"]

TILE = 16


class UnitPool:
    """Fixed storage for `units` folded interventions of up to `rank` rows; unit 0 is empty and
    edits nothing.

    Args:
        units: how many interventions fit, in addition to unit 0.
        rank: largest `Unit` rank, P; shorter units are padded with zero rows, which is exact for
            every kind.
        width: hidden width D.
        device: where the tensors live. They are float32: R is float32 in pyreft, and W - R needs
            it.
    """

    def __init__(
        self, units: int, rank: int, width: int, device: torch.device | str = "cpu"
    ) -> None:
        self.units = units
        self.rank = rank
        self.width = width
        self.A_UPD = torch.zeros(units + 1, rank, width, device=device)
        self.b_UP = torch.zeros(units + 1, rank, device=device)
        self.B_UPD = torch.zeros(units + 1, rank, width, device=device)
        # The activation's code and how many rows of A h + b go through it.
        self.act_U2 = torch.zeros(units + 1, 2, dtype=torch.int32, device=device)
        # What the host must know of each unit: its own rank, and its row of act_U2.
        self.forms: list[tuple[int, int, int]] = [(0, LINEAR, 0)] * (units + 1)

    @property
    def nbytes(self) -> int:
        """Bytes held by the pool."""
        return sum(t.nbytes for t in (self.A_UPD, self.b_UP, self.B_UPD, self.act_U2))

    def write(self, index: int, unit: Unit) -> None:
        """Put `unit` at `index` (1 or more), replacing its previous value."""
        r = len(unit.b)
        for pool, value in ((self.A_UPD, unit.A), (self.b_UP, unit.b), (self.B_UPD, unit.B)):
            pool[index, :r].copy_(value, non_blocking=True)
            pool[index, r:].zero_()
        self.act_U2[index].copy_(torch.tensor((unit.activation, unit.activated), dtype=torch.int32))
        self.forms[index] = (r, unit.activation, unit.activated)

    def read(self, index: int) -> Unit:
        """A copy in host memory of the value at `index`."""
        r, code, activated = self.forms[index]
        A, b, B = (
            pool[index, :r].to("cpu", copy=True) for pool in (self.A_UPD, self.b_UP, self.B_UPD)
        )
        return Unit(A, b, B, code, activated)


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """The edited rows of one step, grouped.

    rows_KM: int32 indices into the step's tokens, -1 where a tile is not full. Every token is in at
    most one tile. key_K: int32. scale_KM: float32 factor on the edit, 1 unless a request asks for
    another strength.
    """

    rows_KM: Tensor
    key_K: Tensor
    scale_KM: Tensor

    def __len__(self) -> int:
        return self.key_K.shape[0]


def tile_rows(
    row_T: NDArray[np.int32], key_T: NDArray[np.int32], scale_T: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """Group rows by key into tiles of `TILE`: (rows_KM, key_K, scale_KM) of `Tiles`, in numpy."""
    order = np.argsort(key_T, kind="stable")
    key = key_T[order]
    first = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    within = np.arange(len(key)) - np.repeat(first, np.diff(np.r_[first, len(key)]))
    column = within % TILE
    starts = column == 0
    tile = np.cumsum(starts) - 1
    rows = np.full((np.count_nonzero(starts), TILE), -1, np.int32)
    scale = np.zeros(rows.shape, np.float32)
    rows[tile, column] = row_T[order]
    scale[tile, column] = scale_T[order]
    return rows, key[starts], scale


def edit_tiles(
    hidden_ND: Tensor, residual_ND: Tensor | None, tiles: Tiles, pool: UnitPool, units_of_CS: Tensor
) -> None:
    """Edit the rows of `tiles` in place, in float32, one rounding to hidden's dtype at the end of
    each pass.

    With a residual the edited stream is hidden + residual, rounded as the model itself would round
    it; the result goes to `hidden` and the residual's row becomes zero, so that their sum is
    exactly what a single tensor would hold.

    Args:
        hidden_ND: changed in place. residual_ND: changed in place, or None where the stream is one
            tensor.
        units_of_CS: int32, unit of each pass and key at this place; passes of a key are filled from
            0 on.
    """
    units_KC = units_of_CS[:, tiles.key_K].T
    live = units_KC.any(dim=1)
    rows_KM = tiles.rows_KM[live]
    used_KM = rows_KM >= 0
    row_T = rows_KM[used_KM].long()
    if not len(row_T):
        return
    h_TD = hidden_ND.index_select(0, row_T)
    if residual_ND is not None:
        h_TD += residual_ND.index_select(0, row_T)
    h_TD = h_TD.float()
    scale_T1 = tiles.scale_KM[live][used_KM].unsqueeze(1)
    rows_of_K = used_KM.sum(dim=1).tolist()
    # Tile by tile: a batched product would first copy A and B of every tile, which takes longer
    # than the products.
    for h_MD, scale_M1, units in zip(
        torch.split(h_TD, rows_of_K),
        torch.split(scale_T1, rows_of_K),
        units_KC[live].tolist(),
        strict=True,
    ):
        for unit in filter(None, units):
            _edit_tile(h_MD, scale_M1, pool, unit)
            h_MD.copy_(h_MD.to(hidden_ND.dtype))
    hidden_ND.index_copy_(0, row_T, h_TD.to(hidden_ND.dtype))
    if residual_ND is not None:
        residual_ND.index_fill_(0, row_T, 0)


def _edit_tile(h_MD: Tensor, scale_M1: Tensor, pool: UnitPool, unit: int) -> None:
    rank, code, activated = pool.forms[unit]
    z_MR = torch.addmm(pool.b_UP[unit, :rank], h_MD, pool.A_UPD[unit, :rank].T)
    if code != LINEAR:
        z_MR[:, :activated] = activate(z_MR[:, :activated], code)
    h_MD.addmm_(z_MR * scale_M1, pool.B_UPD[unit, :rank])
