"""The kernel in Triton's interpreter. `test_fused` runs this file in a process with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from reft_serve.interventions import batched, fused
from reft_serve.interventions.activations import activate
from reft_serve.interventions.batched import TILE, Tiles, UnitPool
from reft_serve.interventions.kinds import fold
from reft_serve.interventions.vocabulary import ACTIVATION_CODES
from tests.support.interventions.edit_cases import Case, cases, random_weights, ulp

often = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
steps = cases(max_width=40, max_tokens=40)


def assert_same(got: Tensor, want: Tensor, size: Tensor, passes: int) -> None:
    """The same within float32's rounding of the terms, of `size`.

    The interpreter cuts float32 to bfloat16 off instead of rounding it (the compiled kernel
    rounds), so bfloat16 may be one number off for the sum with the residual and one for each pass;
    later passes carry that on, at most fourfold here.
    """
    tolerance = 1e-5 * size
    if got.dtype != torch.float32:
        tolerance = tolerance + ulp(size, size, got.dtype) * (4**passes)
    assert bool(((got.double() - want.double()).abs() <= tolerance).all())


@often
@given(steps)
def test_one_pass_of_the_kernel_is_the_batched_edit(case: Case) -> None:
    case = case.pass_only(0)
    (want, want_residual), (got, got_residual) = case.copies(), case.copies()
    batched.edit_tiles(want, want_residual, case.tiles, case.pool, case.units_of_CS)
    fused.edit_tiles(got, got_residual, case.tiles, case.pool, case.units_of_CS)
    _, size = case.expected()
    assert_same(got, want, size, 1)
    others = sorted(set(range(len(got))) - set(case.edited_rows()))
    assert torch.equal(got[others], case.hidden[others])
    if got_residual is not None:
        assert torch.equal(got_residual, want_residual)


@often
@given(cases(dtypes=(torch.float32,), max_width=40, max_tokens=40))
def test_passes_see_what_the_pass_before_stored(case: Case) -> None:
    (want, want_residual), (got, got_residual) = case.copies(), case.copies()
    batched.edit_tiles(want, want_residual, case.tiles, case.pool, case.units_of_CS)
    fused.edit_tiles(got, got_residual, case.tiles, case.pool, case.units_of_CS)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    if got_residual is not None:
        assert torch.equal(got_residual, want_residual)


@often
@given(steps, st.integers(0, 5), st.integers(0, 5))
def test_tiles_beyond_the_count_are_left_alone(case: Case, live: int, beyond: int) -> None:
    case = case.pass_only(0)
    tiles = case.tiles
    live = min(live, len(tiles))
    (want, want_residual), (got, got_residual) = case.copies(), case.copies()
    first = Tiles(tiles.rows_KM[:live], tiles.key_K[:live], tiles.scale_KM[:live])
    fused.edit_tiles(want, want_residual, first, case.pool, case.units_of_CS)
    padded = Tiles(
        torch.cat([tiles.rows_KM, torch.zeros(beyond, TILE, dtype=torch.int32)]),
        torch.cat([tiles.key_K, torch.zeros(beyond, dtype=torch.int32)]),
        torch.cat([tiles.scale_KM, torch.ones(beyond, TILE)]),
    )
    count = torch.tensor([live], dtype=torch.int32)
    fused.edit_tiles(
        got, got_residual, padded, case.pool, case.units_of_CS, count=count, grid=len(padded)
    )
    assert torch.equal(got, want)
    if got_residual is not None:
        assert torch.equal(got_residual, want_residual)


def test_every_activation_is_computed() -> None:
    for name in ACTIVATION_CODES:
        weights = random_weights("nodireft", 20, 5, name)
        pool = UnitPool(1, 6, 20)
        pool.write(1, fold(weights))
        want = 6 * torch.randn(TILE, 20, generator=torch.Generator().manual_seed(1))
        got = want.clone()
        tiles = Tiles(
            torch.arange(TILE, dtype=torch.int32).unsqueeze(0),
            torch.zeros(1, dtype=torch.int32),
            torch.ones(1, TILE),
        )
        units = torch.ones(1, 1, dtype=torch.int32)
        batched.edit_tiles(want, None, tiles, pool, units)
        fused.edit_tiles(got, None, tiles, pool, units)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=name)


def test_activations_hold_at_the_ends() -> None:
    x = torch.tensor([-1e4, -100, -30, -15, -1e-6, 0, 1e-6, 15, 30, 100, 1e4])
    for name, code in ACTIVATION_CODES.items():
        pool = UnitPool(1, len(x), len(x))
        pool.A_UPD[1] = 0
        pool.b_UP[1] = x
        pool.B_UPD[1] = torch.eye(len(x))
        pool.act_U2[1] = torch.tensor([code, len(x)])
        got = torch.zeros(1, len(x))
        rows = torch.tensor([[0] + [-1] * (TILE - 1)], dtype=torch.int32)
        tiles = Tiles(rows, torch.zeros(1, dtype=torch.int32), torch.ones(1, TILE))
        fused.edit_tiles(got, None, tiles, pool, torch.ones(1, 1, dtype=torch.int32))
        torch.testing.assert_close(got[0], activate(x, code), rtol=1e-5, atol=1e-6, msg=name)


def test_hidden_may_be_a_slice_of_something_wider() -> None:
    weights = random_weights("loreft", 20, 5)
    pool = UnitPool(1, 5, 20)
    pool.write(1, fold(weights))
    wide = torch.randn(6, 50)
    want = wide.clone()
    tiles = Tiles(
        torch.tensor([[5, 0, 3] + [-1] * (TILE - 3)], dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        torch.ones(1, TILE),
    )
    units = torch.ones(1, 1, dtype=torch.int32)
    batched.edit_tiles(want[:, 10:30], None, tiles, pool, units)
    fused.edit_tiles(wide[:, 10:30], None, tiles, pool, units)
    torch.testing.assert_close(wide, want, rtol=1e-5, atol=1e-5)


def test_hidden_may_lie_column_by_column() -> None:
    weights = random_weights("loreft", 20, 5)
    pool = UnitPool(1, 5, 20)
    pool.write(1, fold(weights))
    want, want_residual = torch.randn(3, 20), torch.randn(3, 20)
    got, got_residual = (t.T.contiguous().T for t in (want, want_residual))
    rows = torch.tensor([[2, 0] + [-1] * (TILE - 2)], dtype=torch.int32)
    tiles = Tiles(rows, torch.zeros(1, dtype=torch.int32), torch.ones(1, TILE))
    units = torch.ones(1, 1, dtype=torch.int32)
    batched.edit_tiles(want, want_residual, tiles, pool, units)
    fused.edit_tiles(got, got_residual, tiles, pool, units)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(got_residual, want_residual)
