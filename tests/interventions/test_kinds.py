"""`kinds` and `activations` against what pyreft computed, and the folded form against the
reference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers.activations import ACT2FN

from reft_serve.interventions.activations import activate
from reft_serve.interventions.kinds import Unit, Weights, edit, fold
from reft_serve.interventions.vocabulary import (
    ACTIVATION_CODES,
    KINDS,
    Kind,
    has_activation,
    required_tensors,
    unit_rank,
)
from tests.support.interventions.edit_cases import random_weights

OPS = Path(__file__).parents[1] / "golden" / "ops"
GOLDEN = [
    op for op in json.loads((OPS / "ops.json").read_text())["ops"] if "pyreft_error" not in op
]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(OPS / "ops.safetensors")


@pytest.mark.parametrize("op", GOLDEN, ids=lambda op: op["id"])
def test_the_reference_edit_is_pyrefts(op: dict[str, Any], golden: dict[str, Tensor]) -> None:
    prefix = f"{op['id']}/param/"
    tensors = {
        name.removeprefix(prefix): t for name, t in golden.items() if name.startswith(prefix)
    }
    weights = Weights.of(op["type"], tensors, op["act_fn"] or "linear")
    out = edit(golden[f"{op['id']}/h"], weights)
    want = golden[f"{op['id']}/out"]
    assert out.dtype == want.dtype
    torch.testing.assert_close(out.float(), want.float(), rtol=0, atol=1e-5)


def test_the_golden_edits_cover_every_kind_and_dtype() -> None:
    assert {op["type"] for op in GOLDEN} == set(KINDS)
    assert {op["base_dtype"] for op in GOLDEN} == {"float32", "bfloat16", "float16"}


def test_every_activation_of_transformers_is_known_but_those_with_weights_of_their_own() -> None:
    assert set(ACT2FN) - set(ACTIVATION_CODES) == {"prelu", "xielu"}


@pytest.mark.parametrize("name", sorted(ACTIVATION_CODES))
def test_an_activation_is_that_of_transformers(name: str) -> None:
    x = torch.linspace(-30, 30, 4001)
    torch.testing.assert_close(
        activate(x, ACTIVATION_CODES[name]), ACT2FN[name](x), rtol=1e-6, atol=1e-6
    )


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(sorted(ACTIVATION_CODES)),
    st.integers(1, 9),
    st.integers(0, 1 << 20),
)
def test_the_folded_unit_is_the_edit(kind: Kind, name: str, rank: int, seed: int) -> None:
    weights = random_weights(kind, 12, rank, name if has_activation(kind) else "linear", seed)
    weights = Weights.of(
        kind, {n: t.double() for n, t in weights.tensors().items()}, weights.activation
    )
    h = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    unit = fold(weights, torch.float64)
    z = h @ unit.A.T + unit.b
    z[:, : unit.activated] = activate(z[:, : unit.activated], unit.activation)
    torch.testing.assert_close(h + z @ unit.B, edit(h, weights), rtol=1e-12, atol=1e-11)
    assert len(unit.b) == unit_rank(kind, rank, weights.activation)


def test_an_orthonormal_loreft_sets_its_subspace_and_leaves_the_rest() -> None:
    weights = random_weights("loreft", 16, 3)
    h = torch.randn(7, 16)
    out = edit(h, weights)
    torch.testing.assert_close(out @ weights.R.T, h @ weights.W.T + weights.b, rtol=1e-5, atol=1e-5)
    rest = torch.eye(16) - weights.R.T @ weights.R
    torch.testing.assert_close(out @ rest, h @ rest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_edit_keeps_the_dtype_of_the_stream_whatever_the_adapters_is(
    dtype: torch.dtype,
) -> None:
    for kind in KINDS:
        weights = random_weights(kind, 16, 3)
        h = torch.randn(4, 16).to(dtype)
        out = edit(h, weights)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), edit(h.float(), weights), rtol=2e-2, atol=2e-2)


def test_weights_name_their_tensors() -> None:
    for kind in KINDS:
        assert set(required_tensors(kind)) <= set(random_weights(kind, 8, 2).tensors())


@pytest.mark.parametrize(
    ("unit", "nothing"),
    [
        (Unit(torch.ones(1, 3), torch.ones(1), torch.zeros(1, 3)), True),
        (Unit(torch.zeros(1, 3), torch.zeros(1), torch.ones(1, 3)), True),
        (Unit(torch.zeros(1, 3), torch.ones(1), torch.ones(1, 3)), False),
        (Unit(torch.ones(1, 3), torch.zeros(1), torch.ones(1, 3)), False),
        (
            Unit(
                torch.zeros(1, 3), torch.zeros(1), torch.ones(1, 3), ACTIVATION_CODES["sigmoid"], 1
            ),
            False,
        ),
        (
            Unit(torch.zeros(1, 3), -torch.ones(1), torch.ones(1, 3), ACTIVATION_CODES["relu"], 1),
            True,
        ),
    ],
)
def test_a_unit_knows_whether_it_does_nothing(unit: Unit, nothing: bool) -> None:
    assert unit.does_nothing is nothing
