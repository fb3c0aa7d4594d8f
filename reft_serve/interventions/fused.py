"""`batched.edit_tiles` as one Triton kernel: one launch per place, one program per tile of rows.

A program reads each hidden row twice and writes it once per pass, and A and B once: for a unit of P
rows over width D and M rows per tile, 8 P D bytes of unit against 6 M D bytes of bf16 rows (P 8, M
16: 64 D against 96 D, about 0.7 MB at D 4096), for 4 M P D multiply-adds in float32: 2 to 3
operations per byte, so the memory sets the floor. Rows that share a key share A and B through the
tile; tiles that share a key share them through the L2 cache.
"""

# Kernels take flat, untyped arguments.
# ruff: noqa: PLR0912
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from reft_serve.interventions.batched import TILE, Tiles, UnitPool

__all__ = ["edit_tiles"]


def edit_tiles(
    hidden_ND: Tensor,
    residual_ND: Tensor | None,
    tiles: Tiles,
    pool: UnitPool,
    units_of_CS: Tensor,
    *,
    count: Tensor | None = None,
    grid: int | None = None,
) -> None:
    """Edit the rows of `tiles` in place, as `batched.edit_tiles` does.

    Safe to capture in a CUDA graph: nothing is allocated, copied or waited for, and every tensor is
    read on the device, so that a replay takes the rows, units and count which are there by then.

    Args:
        hidden_ND, residual_ND, tiles, pool, units_of_CS: as for `batched.edit_tiles`, contiguous
            except the rows of hidden and residual, which may have any stride.
        count: int32 (1,), how many of the first tiles are live; the others may hold anything. None:
            all of them.
        grid: programs to launch, at least `count` and at most the number of tiles. None: the number
            of tiles.
    """
    programs = len(tiles) if grid is None else grid
    if not programs:
        return
    residual = hidden_ND if residual_ND is None else residual_ND
    _edit_tile[(programs,)](
        hidden_ND,
        residual,
        tiles.rows_KM,
        tiles.key_K,
        tiles.scale_KM,
        count,
        units_of_CS,
        pool.A_UPD,
        pool.b_UP,
        pool.B_UPD,
        pool.act_U2,
        pool.width,
        pool.rank,
        units_of_CS.shape[1],
        *hidden_ND.stride(),
        *residual.stride(),
        HAS_RESIDUAL=residual_ND is not None,
        PASSES=units_of_CS.shape[0],
        TILE=TILE,
        **launch_options(pool.rank),
    )


def launch_options(rank: int) -> dict[str, int]:
    """Block sizes and launch settings for a pool of this rank: a chunk of A or B stays within 32
    KiB of shared memory.
    """
    block_p = max(16, triton.next_power_of_2(rank))
    return {
        "BLOCK_P": block_p,
        "BLOCK_D": min(128, max(16, 8192 // block_p)),
        "num_warps": 4 if block_p <= 32 else 8 if block_p <= 128 else 16,
        "num_stages": 2 if block_p <= 128 else 1,
    }


@triton.jit(do_not_specialize_on_alignment=["units_of_CS"])
def _edit_tile(
    hidden,
    residual,
    rows_KM,
    key_K,
    scale_KM,
    count,
    units_of_CS,
    A_UPD,
    b_UP,
    B_UPD,
    act_U2,
    width,
    rank,
    keys,
    hidden_stride,
    hidden_step,
    residual_stride,
    residual_step,
    HAS_RESIDUAL: tl.constexpr,
    PASSES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0)
    if count is not None:  # noqa: SIM102 (decided when the kernel is compiled)
        if tile >= tl.load(count):
            return
    m = tl.arange(0, TILE)
    p = tl.arange(0, BLOCK_P)
    row = tl.load(rows_KM + tile * TILE + m)
    used = row >= 0
    scale = tl.load(scale_KM + tile * TILE + m)
    hidden_row = hidden + row.to(tl.int64)[:, None] * hidden_stride
    residual_row = residual + row.to(tl.int64)[:, None] * residual_stride
    key = tl.load(key_K + tile)
    for c in range(PASSES):
        unit = tl.load(units_of_CS + c * keys + key).to(tl.int64)
        if unit > 0:
            tl.debug_barrier()  # what the pass before stored is seen
            A = A_UPD + unit * rank * width + p[:, None] * width
            B = B_UPD + unit * rank * width + p[:, None] * width
            z = tl.full((TILE, BLOCK_P), 0.0, tl.float32)
            for start in range(0, width, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                inside = (p < rank)[:, None] & (d < width)[None, :]
                h = _stream(
                    hidden_row,
                    residual_row,
                    d,
                    used,
                    width,
                    hidden_step,
                    residual_step,
                    HAS_RESIDUAL,
                )
                z = tl.dot(
                    h,
                    tl.trans(tl.load(A + d[None, :], mask=inside, other=0.0)),
                    z,
                    input_precision="ieee",
                )
            z += tl.load(b_UP + unit * rank + p, mask=p < rank, other=0.0)[None, :]
            code = tl.load(act_U2 + unit * 2)
            activated = tl.load(act_U2 + unit * 2 + 1)
            if code > 0:
                z = tl.where((p < activated)[None, :], _activate(z, code), z)
            z *= scale[:, None]
            tl.debug_barrier()  # every warp has read the rows before any is changed
            for start in range(0, width, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                inside = (p < rank)[:, None] & (d < width)[None, :]
                here = used[:, None] & (d < width)[None, :]
                h = _stream(
                    hidden_row,
                    residual_row,
                    d,
                    used,
                    width,
                    hidden_step,
                    residual_step,
                    HAS_RESIDUAL,
                )
                h = tl.dot(
                    z, tl.load(B + d[None, :], mask=inside, other=0.0), h, input_precision="ieee"
                )
                tl.store(
                    hidden_row + d[None, :] * hidden_step, h.to(hidden.dtype.element_ty), mask=here
                )
                if HAS_RESIDUAL:
                    nothing = tl.full((TILE, BLOCK_D), 0.0, residual.dtype.element_ty)
                    tl.store(residual_row + d[None, :] * residual_step, nothing, mask=here)


@triton.jit
def _stream(
    hidden_row, residual_row, d, used, width, hidden_step, residual_step, HAS_RESIDUAL: tl.constexpr
):
    """A chunk of the edited stream in float32: hidden, or hidden + residual rounded as the model
    rounds it.
    """
    here = used[:, None] & (d < width)[None, :]
    h = tl.load(hidden_row + d[None, :] * hidden_step, mask=here, other=0.0)
    if HAS_RESIDUAL:
        r = tl.load(residual_row + d[None, :] * residual_step, mask=here, other=0.0)
        h = (h.to(tl.float32) + r.to(tl.float32)).to(h.dtype)
    return h.to(tl.float32)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0.0, -1.0, 1.0) * ((1.0 - e) / (1.0 + e))


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _softplus(x):
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    # log(1 + e) without losing a small e (Goldberg).
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _activate(z, code):
    """The activation `code` of `vocabulary.ACTIVATION_CODES`; 0 leaves z as it is."""
    if code == 1:
        z = tl.maximum(z, 0.0)
    elif code == 2:
        z = _tanh(z)
    elif code == 3:
        z = _sigmoid(z)
    elif code == 4:
        z = z * _sigmoid(z)
    elif code == 5:
        z = _gelu(z)
    elif code == 6:
        z = 0.5 * z * (1.0 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif code == 7:
        z = tl.minimum(tl.maximum(_gelu(z), -10.0), 10.0)
    elif code == 8:
        z = z * _sigmoid(1.702 * z)
    elif code == 9:
        z = z * tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) / 6.0
    elif code == 10:
        z = 0.5 * (1.0 + tl.erf((z - 0.707107) / 0.39894257487763823))
    elif code == 11:
        z = tl.where(z > 0.0, z, 0.01 * z)
    elif code == 12:
        z = z * _tanh(_softplus(z))
    elif code == 13:
        z = tl.maximum(z, 0.0) * tl.maximum(z, 0.0)
    elif code == 14:
        z = tl.minimum(tl.maximum(z, 0.0), 6.0)
    elif code == 15:
        z = tl.sqrt(_softplus(z))
    return z
