"""`batched`: rows of many adapters edited at once are what the reference gives row by row."""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reft_serve.interventions.batched import TILE, Tiles, UnitPool, edit_tiles, tile_rows
from reft_serve.interventions.kinds import Unit, edit, fold
from tests.support.interventions.edit_cases import Case, cases, random_weights, ulp

often = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    hidden, residual = case.copies()
    edit_tiles(hidden, residual, case.tiles, case.pool, case.units_of_CS)
    return hidden, residual


@often
@given(cases())
def test_every_row_is_what_the_reference_makes_of_it_alone(case: Case) -> None:
    """Tolerance: float32 sums of D + R terms are off by at most (D + R) 2^-24 of the terms' sizes, under 5e-6 here, so 1e-5;
    a narrower stream adds one rounding of a value that close: at most the neighbouring number of its dtype.
    """
    case = case.pass_only(0)
    hidden, _ = run(case)
    want, size = case.expected()
    rounded = want.to(hidden.dtype)
    tolerance = 1e-5 * size
    if hidden.dtype != torch.float32:
        tolerance += ulp(hidden, rounded, hidden.dtype)
    edited = case.edited_rows()
    assert bool(((hidden.double() - rounded.double()).abs() <= tolerance)[edited].all())


@often
@given(cases())
def test_all_other_rows_keep_their_bits(case: Case) -> None:
    hidden, residual = run(case)
    others = sorted(set(range(len(hidden))) - set(case.edited_rows()))
    assert torch.equal(hidden[others], case.hidden[others])
    if residual is not None:
        assert torch.equal(residual[others], case.residual[others])


@often
@given(cases())
def test_the_residual_of_an_edited_row_becomes_zero(case: Case) -> None:
    _, residual = run(case)
    if residual is not None:
        assert not residual[case.edited_rows()].any()


@often
@given(cases(dtypes=(torch.float32,)))
def test_passes_act_one_after_another(case: Case) -> None:
    together, _ = run(case)
    hidden, residual = case.copies()
    for c in range(len(case.units_of_CS)):
        edit_tiles(hidden, residual, case.tiles, case.pool, case.units_of_CS[c : c + 1])
    torch.testing.assert_close(together, hidden, rtol=1e-4, atol=1e-4)


def test_every_pass_rounds_to_the_dtype_of_the_stream() -> None:
    pool = UnitPool(1, 1, 4)
    pool.write(1, Unit(torch.zeros(1, 4), torch.ones(1), torch.full((1, 4), 0.003)))
    hidden = torch.ones(1, 4, dtype=torch.bfloat16)
    tiles = Tiles(
        *map(
            torch.from_numpy,
            tile_rows(np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.float32)),
        )
    )
    edit_tiles(hidden, None, tiles, pool, torch.ones(4, 1, dtype=torch.int32))
    # 0.003 is less than half of bfloat16's spacing at 1, four times 0.003 is more.
    assert torch.equal(hidden, torch.ones(1, 4, dtype=torch.bfloat16))


@often
@given(cases(dtypes=(torch.float32,)))
def test_a_tensor_in_two_parts_is_edited_as_their_sum(case: Case) -> None:
    if case.residual is None:
        return
    hidden, _ = run(case)
    summed = case.stream
    edit_tiles(summed, None, case.tiles, case.pool, case.units_of_CS)
    edited = case.edited_rows()
    assert torch.equal(hidden[edited], summed[edited])


def test_strength_zero_keeps_the_stream_and_strength_one_is_the_edit() -> None:
    weights = random_weights("loreft", 24, 4, "tanh")
    pool = UnitPool(1, 8, 24)
    pool.write(1, fold(weights))
    hidden = torch.randn(3, 24)
    edited = hidden.clone()
    strengths = np.array([0, 1, 0.5], np.float32)
    tiles = Tiles(
        *map(
            torch.from_numpy,
            tile_rows(np.arange(3, dtype=np.int32), np.zeros(3, np.int32), strengths),
        )
    )
    edit_tiles(edited, None, tiles, pool, torch.ones(1, 1, dtype=torch.int32))
    full = edit(hidden, weights)
    assert torch.equal(edited[0], hidden[0])
    torch.testing.assert_close(edited[1], full[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(edited[2], (hidden[2] + full[2]) / 2, rtol=1e-5, atol=1e-5)


def test_rows_may_have_any_stride() -> None:
    weights = random_weights("direft", 16, 3)
    pool = UnitPool(1, 3, 16)
    pool.write(1, fold(weights))
    wide = torch.randn(5, 40)
    before = wide.clone()
    tiles = Tiles(
        torch.tensor([[4, 2] + [-1] * (TILE - 2)], dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        torch.ones(1, TILE),
    )
    edit_tiles(wide[:, :16], None, tiles, pool, torch.ones(1, 1, dtype=torch.int32))
    torch.testing.assert_close(
        wide[[2, 4], :16], edit(before[[2, 4], :16], weights), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(wide[:, 16:], before[:, 16:])


def test_a_unit_written_over_a_longer_one_leaves_nothing_of_it() -> None:
    first, second = (
        random_weights("loreft", 16, 8, seed=1),
        random_weights("loreft", 16, 2, "gelu", seed=2),
    )
    used, fresh = UnitPool(1, 8, 16), UnitPool(1, 8, 16)
    used.write(1, fold(first))
    used.write(1, fold(second))
    fresh.write(1, fold(second))
    assert used.forms == fresh.forms
    for name in ("A_UPD", "b_UP", "B_UPD", "act_U2"):
        assert torch.equal(getattr(used, name), getattr(fresh, name))


@often
@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(-2, 2, width=32)), max_size=100), st.randoms()
)
def test_tiles_hold_every_row_once_with_its_own_key_and_strength(
    tagged: list[tuple[int, float]], random: Random
) -> None:
    rows = list(range(len(tagged)))
    random.shuffle(rows)
    row_T = np.array(rows, np.int32)
    key_T = np.array([key for key, _ in tagged], np.int32)
    scale_T = np.array([scale for _, scale in tagged], np.float32)
    rows_KM, key_K, scale_KM = tile_rows(row_T, key_T, scale_T)
    assert rows_KM.shape == scale_KM.shape == (len(key_K), TILE)
    k, m = np.nonzero(rows_KM >= 0)
    held = sorted(zip(rows_KM[k, m], key_K[k], scale_KM[k, m], strict=True))
    assert held == sorted(zip(row_T, key_T, scale_T, strict=True))
    assert len(key_K) == sum(-(-count // TILE) for count in np.unique(key_T, return_counts=True)[1])
