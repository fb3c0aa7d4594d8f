"""Random steps: adapters, rows and hidden states, for the tests that compare one form of the edit
with another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from reft_serve.interventions.activations import activate
from reft_serve.interventions.batched import Tiles, UnitPool, tile_rows
from reft_serve.interventions.kinds import Unit, Weights, edit, fold
from reft_serve.interventions.vocabulary import (
    ACTIVATION_CODES,
    KINDS,
    ORTHONORMAL,
    Kind,
    has_activation,
    optional_tensors,
    required_tensors,
    unit_rank,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_weights(
    kind: Kind, width: int, rank: int, activation: str = "linear", seed: int = 0
) -> Weights:
    """Weights of ordinary size; R with orthonormal rows."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in required_tensors(kind) + optional_tensors(kind):
        if name in ("b", "b2"):
            tensors[name] = torch.randn(rank, generator=random)
        else:
            tensors[name] = torch.randn(rank, width, generator=random) / width**0.5
    if kind in ORTHONORMAL:
        tensors["R"] = torch.linalg.qr(tensors["R"].T).Q.T.contiguous()
    return Weights.of(kind, tensors, activation)


@dataclass(frozen=True)
class Case:
    """One step at one place. `weights[u - 1]` is unit u of the pool."""

    hidden: Tensor
    residual: Tensor | None
    row_T: np.ndarray
    key_T: np.ndarray
    scale_T: np.ndarray
    weights: list[Weights]
    pool: UnitPool
    units_of_CS: Tensor

    @property
    def tiles(self) -> Tiles:
        return Tiles(
            *(torch.from_numpy(part) for part in tile_rows(self.row_T, self.key_T, self.scale_T))
        )

    @property
    def stream(self) -> Tensor:
        return self.hidden if self.residual is None else self.hidden + self.residual

    def copies(self) -> tuple[Tensor, Tensor | None]:
        return self.hidden.clone(), None if self.residual is None else self.residual.clone()

    def pass_only(self, c: int) -> Case:
        return replace(self, units_of_CS=self.units_of_CS[c : c + 1])

    def edited_rows(self) -> list[int]:
        """Rows that some intervention touches."""
        return [
            int(t)
            for t, key in zip(self.row_T, self.key_T, strict=True)
            if self.units_of_CS[:, key].any()
        ]

    def expected(self) -> tuple[Tensor, Tensor]:
        """The first pass by the reference, row by row in float64, and the size of the terms it
        sums, elementwise.
        """
        want, size = self.stream.double(), self.stream.double().abs()
        for t, key, scale in zip(self.row_T, self.key_T, self.scale_T, strict=True):
            unit = int(self.units_of_CS[0, key])
            if not unit:
                continue
            weights = self.weights[unit - 1]
            h = want[t : t + 1].clone()
            double = {name: tensor.double() for name, tensor in weights.tensors().items()}
            delta = edit(h, Weights.of(weights.kind, double, weights.activation)) - h
            want[t] = (h + float(scale) * delta)[0]
            folded = fold(weights, torch.float64)
            z = h.abs() @ folded.A.abs().T + folded.b.abs()
            # relu2 has the steepest slope, 2 z.
            size[t] += (abs(float(scale)) * z * (1 + 2 * z) @ folded.B.abs())[0]
            assert torch.allclose(delta, _unfolded(h, folded), rtol=1e-9, atol=1e-9)
        return want, size


def _unfolded(h: Tensor, unit: Unit) -> Tensor:
    z = h @ unit.A.T + unit.b
    z[:, : unit.activated] = activate(z[:, : unit.activated], unit.activation)
    return z @ unit.B


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    max_width: int = 70,
    max_rank: int = 12,
    max_tokens: int = 60,
) -> Case:
    """Any kinds, ranks, activations, dtypes, rows (none to several tiles, in any order), parts, passes and strengths."""
    width = draw(st.integers(1, max_width))
    pool_rank = draw(st.integers(2, max_rank))
    seed = draw(st.integers(0, 1 << 30))
    weights = []
    for index in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(KINDS))
        activation = (
            draw(st.sampled_from(sorted(ACTIVATION_CODES))) if has_activation(kind) else "linear"
        )
        fits = [r for r in range(1, width + 1) if unit_rank(kind, r, activation) <= pool_rank]
        weights.append(
            random_weights(kind, width, draw(st.sampled_from(fits)), activation, seed + index)
        )
    pool = UnitPool(len(weights), pool_rank, width)
    for index, w in enumerate(weights, 1):
        pool.write(index, fold(w))
    passes, keys = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 2))
    units_of_CS = torch.zeros(passes, keys, dtype=torch.int32)
    for key in range(keys):
        chosen = draw(st.lists(st.integers(1, len(weights)), max_size=passes))
        units_of_CS[: len(chosen), key] = torch.tensor(chosen, dtype=torch.int32)
    random = np.random.default_rng(seed)
    tokens = draw(st.integers(1, max_tokens))
    edited = draw(st.integers(0, tokens))
    scales = random.uniform(-1, 2, edited) if draw(st.booleans()) else np.ones(edited)
    torch_random = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from(dtypes))

    def states() -> Tensor:
        return (2 * torch.randn(tokens, width, generator=torch_random)).to(dtype)

    return Case(
        hidden=states(),
        residual=states() if draw(st.booleans()) else None,
        row_T=random.permutation(tokens)[:edited].astype(np.int32),
        key_T=random.integers(0, draw(st.integers(1, keys)), edited).astype(np.int32),
        scale_T=scales.astype(np.float32),
        weights=weights,
        pool=pool,
        units_of_CS=units_of_CS,
    )


def ulp(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at the larger of two magnitudes, in float64."""
    largest = torch.maximum(a.double().abs(), b.double().abs()).clamp(min=torch.finfo(dtype).tiny)
    return torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(largest)))
