"""The kernel on a GPU, at the sizes it is meant for, alone and inside captured graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reft_serve.interventions import batched
from reft_serve.interventions.batched import TILE, Tiles, UnitPool, tile_rows
from reft_serve.interventions.kinds import fold
from reft_serve.interventions.vocabulary import ACTIVATION_CODES, KINDS, has_activation
from tests.support.interventions.edit_cases import DTYPES, random_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

WIDTH, TOKENS, MAX_TILES = 4096, 1024, 64


@pytest.fixture(scope="module")
def fused() -> Any:
    from reft_serve.interventions import fused

    return fused


@pytest.fixture(scope="module")
def pool() -> UnitPool:
    """A unit of every kind and activation, of ranks 1 to 8."""
    choices = [
        (k, a) for k in KINDS for a in ACTIVATION_CODES if has_activation(k) or a == "linear"
    ]
    pool = UnitPool(len(choices), 16, WIDTH, "cuda")
    for index, (kind, activation) in enumerate(choices, 1):
        pool.write(index, fold(random_weights(kind, WIDTH, 1 + index % 8, activation, index)))
    return pool


def tiles_of(seed: int, edited: int, keys: int) -> Tiles:
    random = np.random.default_rng(seed)
    parts = tile_rows(
        random.permutation(TOKENS)[:edited].astype(np.int32),
        random.integers(0, keys, edited).astype(np.int32),
        random.uniform(0.5, 1.5, edited).astype(np.float32),
    )
    return Tiles(*(torch.from_numpy(part).cuda() for part in parts))


def states(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(
        "cuda", dtype
    )


def tolerances(dtype: torch.dtype) -> dict[str, float]:
    """Two orders of a float32 sum over D 4096; a narrower stream may round either way, once per pass."""
    return (
        {"rtol": 2e-5, "atol": 2e-5}
        if dtype == torch.float32
        else {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2e-2}
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("passes", [1, 4])
def test_the_kernel_is_the_batched_edit(
    fused: Any, pool: UnitPool, dtype: torch.dtype, with_residual: bool, passes: int
) -> None:
    keys = 32
    units = torch.randint(1, pool.units + 1, (passes, keys), dtype=torch.int32).cuda()
    units[:, 3] = 0
    tiles = tiles_of(1, 450, keys)
    want, got = states(2, dtype), states(2, dtype)
    want_residual, got_residual = (
        (states(3, dtype), states(3, dtype)) if with_residual else (None, None)
    )
    batched.edit_tiles(want, want_residual, tiles, pool, units)
    fused.edit_tiles(got, got_residual, tiles, pool, units)
    torch.testing.assert_close(got, want, **tolerances(dtype))
    if with_residual:
        assert torch.equal(got_residual, want_residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_edits_the_rows_that_are_there_when_it_is_replayed(
    fused: Any, pool: UnitPool, dtype: torch.dtype
) -> None:
    keys = 32
    units = torch.randint(1, pool.units + 1, (1, keys), dtype=torch.int32).cuda()
    buffers = Tiles(
        torch.full((MAX_TILES, TILE), -1, dtype=torch.int32, device="cuda"),
        torch.zeros(MAX_TILES, dtype=torch.int32, device="cuda"),
        torch.zeros(MAX_TILES, TILE, device="cuda"),
    )
    count = torch.zeros(1, dtype=torch.int32, device="cuda")
    hidden, residual = states(4, dtype), states(5, dtype)

    def launch() -> None:
        fused.edit_tiles(hidden, residual, buffers, pool, units, count=count, grid=MAX_TILES)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for seed, edited in ((6, 300), (7, 1), (8, 0), (9, 450), (10, 17)):
        hidden.copy_(states(seed, dtype))
        residual.copy_(states(seed + 100, dtype))
        want, want_residual = hidden.clone(), residual.clone()
        tiles = tiles_of(seed, edited, keys)
        for buffer, part in (
            (buffers.rows_KM, tiles.rows_KM),
            (buffers.key_K, tiles.key_K),
            (buffers.scale_KM, tiles.scale_KM),
        ):
            buffer[: len(tiles)].copy_(part)  # what lies beyond is left from the step before
        count.fill_(len(tiles))
        graph.replay()
        batched.edit_tiles(want, want_residual, tiles, pool, units)
        torch.testing.assert_close(hidden, want, **tolerances(dtype))
        assert torch.equal(residual, want_residual)
