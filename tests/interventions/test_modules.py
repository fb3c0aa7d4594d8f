"""`modules`: what is trained is what is served, and R stays orthonormal whatever the optimiser
does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import orthogonal

from reft_serve.errors import AdapterInvalid
from reft_serve.interventions.kinds import Weights, edit
from reft_serve.interventions.modules import Intervention
from reft_serve.interventions.vocabulary import (
    KINDS,
    ORTHONORMAL,
    Kind,
    has_activation,
    optional_tensors,
    required_tensors,
)
from tests.support.interventions.edit_cases import random_weights

WIDTH = 12
# Rank 12 is the square R, for which torch uses another map.
RANKS = (1, 4, 12)


def new(kind: Kind, rank: int = 4, activation: str = "gelu", **kwargs: Any) -> Intervention:
    torch.manual_seed(rank)
    return Intervention(
        kind, WIDTH, rank, activation if has_activation(kind) else "linear", **kwargs
    )


def train(module: Intervention, steps: int = 20, weight_decay: float = 0.3) -> list[float]:
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=weight_decay)
    h = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (module(h) - h.flip(0)).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def orthonormal_error(R: Tensor) -> float:
    return float((R @ R.T - torch.eye(len(R))).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", RANKS)
def test_what_a_trained_module_gives_is_what_its_weights_give_when_served(
    kind: Kind, rank: int
) -> None:
    module = new(kind, rank)
    train(module)
    module.eval()
    h = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(edit(h, module.weights()), module(h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_edit(kind: Kind) -> None:
    module = new(kind, activation="tanh").double()
    names, values = zip(
        *((name, p.detach().clone()) for name, p in module.named_parameters()), strict=True
    )
    h = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)

    def forward(h: Tensor, *values: Tensor) -> Any:
        return functional_call(module, dict(zip(names, values, strict=True)), (h,))

    with torch.no_grad():  # away from the start, where R = base is a special point
        moved = [value + 0.1 * torch.randn_like(value) for value in values]
    for value in moved:
        value.requires_grad_()
        if value.shape == (WIDTH, 4):
            value.data.fill_diagonal_(-1)
    assert torch.autograd.gradcheck(forward, (h, *moved))


@pytest.mark.parametrize("kind", sorted(ORTHONORMAL))
@pytest.mark.parametrize("rank", RANKS)
def test_r_stays_orthonormal_and_alive_through_training_with_weight_decay(
    kind: Kind, rank: int
) -> None:
    module = new(kind, rank)
    before = module.weights().R
    train(module)
    after = module.weights().R
    assert after.dtype == torch.float32
    assert orthonormal_error(after) < 1e-5
    assert float((after - before).abs().max()) > 0.01


@pytest.mark.parametrize("rank", RANKS)
def test_the_rotation_and_its_gradient_are_those_of_torchs_parametrization(rank: int) -> None:
    rotation = new("loreft", rank).rotation.double()
    original = rotation.parametrizations.weight.original
    with torch.no_grad():  # away from the start, where R = base is a special point
        original += 0.3 * torch.randn_like(original)
        original.fill_diagonal_(-1)
    pull = torch.randn(rank, WIDTH, dtype=torch.float64)
    mine, theirs = rotation.rows(), rotation.weight.T
    torch.testing.assert_close(mine, theirs)
    gradients = [torch.autograd.grad((R * pull).sum(), original)[0] for R in (mine, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns(kind: Kind) -> None:
    losses = train(new(kind), steps=40, weight_decay=0.0)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", RANKS)
def test_resumed_weights_are_there_bit_for_bit_and_train_on_soundly(kind: Kind, rank: int) -> None:
    trained = new(kind, rank)
    train(trained)
    weights = trained.weights()
    module = Intervention.of(weights)
    for name, tensor in module.weights().tensors().items():
        assert torch.equal(tensor, weights.tensors()[name]), name
    train(module)
    if kind in ORTHONORMAL:
        assert orthonormal_error(module.weights().R) < 1e-5


def test_an_r_that_is_not_orthonormal_cannot_be_resumed_from() -> None:
    weights = random_weights("loreft", WIDTH, 3)
    bent = Weights("loreft", weights.b, R=weights.R * 1.1, W=weights.W)
    with pytest.raises(AdapterInvalid, match="not orthonormal"):
        Intervention.of(bent)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if has_activation(kind)])
def test_dropout_falls_on_the_whole_edited_state_in_training_only(kind: Kind) -> None:
    module = new(kind, dropout=0.5)
    h = torch.randn(200, WIDTH)
    module.eval()
    edited = module(h)
    assert torch.equal(edited, module(h))
    module.train()
    dropped = module(h)
    kept = dropped != 0
    assert 0.4 < float(kept.float().mean()) < 0.6
    torch.testing.assert_close(dropped[kept], 2 * edited[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["consreft", "lobireft"])
def test_kinds_without_a_source_have_no_dropout(kind: Kind) -> None:
    module = new(kind, dropout=0.5)
    h = torch.randn(20, WIDTH)
    assert torch.equal(module(h), module.eval()(h))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_have_the_names_shapes_and_dtypes_of_an_adapter(
    kind: Kind, dtype: torch.dtype
) -> None:
    for add_bias in (True, False):
        tensors = new(kind, rank=3, add_bias=add_bias, dtype=dtype).weights().tensors()
        expected = required_tensors(kind) + (optional_tensors(kind) if add_bias else ())
        assert set(tensors) == set(expected)
        for name, tensor in tensors.items():
            assert tensor.shape == ((3,) if name in ("b", "b2") else (3, WIDTH))
            full = name == "R" or (name == "b" and not has_activation(kind))
            assert tensor.dtype == (torch.float32 if full else dtype)
            assert tensor.is_contiguous()
            assert not tensor.requires_grad


def test_a_seed_gives_the_start_that_pyreft_draws() -> None:
    module = new("loreft", rank=4)
    torch.manual_seed(4)
    rotate_layer = nn.Module()
    rotate_layer.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(WIDTH, 4)))
    orthogonal(rotate_layer)
    learned_source = nn.Linear(WIDTH, 4)
    weights = module.weights()
    assert torch.equal(weights.R, rotate_layer.weight.T)
    assert torch.equal(weights.W, learned_source.weight)
    assert torch.equal(weights.b, learned_source.bias)


@pytest.mark.parametrize("kind", ["consreft", "lobireft"])
def test_a_constant_source_starts_between_zero_and_one(kind: Kind) -> None:
    b = new(kind, rank=12).weights().b
    assert bool(((b >= 0) & (b < 1)).all())
    assert len(set(b.tolist())) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing_of_the_edit(kind: Kind) -> None:
    module = new(kind)
    h = torch.randn(5, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        under = module(h)
    assert torch.equal(under, module(h))


def test_weights_are_a_copy_that_training_does_not_change() -> None:
    module = new("loreft")
    weights = module.weights()
    kept = {name: tensor.clone() for name, tensor in weights.tensors().items()}
    train(module, steps=2)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights.tensors().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_resumes_bit_for_bit(kind: Kind) -> None:
    module = new(kind)
    train(module, steps=5)
    other = new(kind, rank=4)
    other.load_state_dict(module.state_dict())
    h = torch.randn(5, WIDTH)
    assert torch.equal(other(h), module(h))
