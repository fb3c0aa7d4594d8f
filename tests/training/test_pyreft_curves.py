"""The trainer against pyreft 0.1.0: same initial weights, same batches, same losses, same final weights.

`fixtures/record_pyreft.py` says how pyreft's side was recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import Kind
from reft_serve.training.data.examples import IGNORED, Example
from reft_serve.training.loop.objectives import Supervised
from reft_serve.training.loop.trainer import ReftTrainer, arguments
from reft_serve.training.model.adapter import build
from reft_serve.training.model.edited_model import EditedModel
from reft_serve.training.plan import AdapterPlan, Plan
from tests.support.paths import GOLDEN

CURVES = load_file(Path(__file__).parent / "fixtures" / "pyreft_curves.safetensors")
BASE = GOLDEN / "models" / "tiny-llama"


class Losses:
    """A watcher that keeps the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def started(self, step: int, steps: int) -> None: ...

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        self.losses.append(metrics["loss"])

    def saved(self, step: int, path: Path) -> None: ...

    def wants_stop(self) -> bool:
        return False


CASES = [(kind, tied, True) for kind in ("loreft", "direft", "noreft") for tied in (True, False)]


@pytest.mark.parametrize(("kind", "tied", "packed"), [*CASES, ("loreft", False, False)])
def test_fifty_steps_are_those_of_pyreft(
    kind: Kind, tied: bool, packed: bool, tmp_path: Path
) -> None:
    case = f"{kind}_{'tied' if tied else 'untied'}"
    plan = Plan(
        adapter=AdapterPlan(kind, 4, (0, 3), PositionRule("f3+l3", tied)),
        max_steps=50, batch=4, learning_rate=5e-3, warmup=0.1, seed=0, shuffle=False, save_every=50,
    )  # fmt: skip
    model = build(BASE, plan)
    assert isinstance(model, EditedModel)
    _begin_as_pyreft(model, case)
    assert model.can_pack(48)
    if not packed:
        model.lm.set_attn_implementation("sdpa")
    watcher = Losses()
    trainer = ReftTrainer(
        model, plan, arguments(plan, tmp_path, evaluates=False), Supervised(), list(_examples()), [],
        lambda path: path.mkdir(), packed=packed, watchers=[watcher],
    )  # fmt: skip
    trainer.train()
    ours, theirs = torch.tensor(watcher.losses, dtype=torch.float64), CURVES[f"{case}/loss"]
    assert len(ours) == len(theirs) == 50
    relative = ((ours - theirs).abs() / theirs).max().item()
    furthest = max(_distances(model, case))
    print(f"{case}: loss within {relative:.1e} relative, weights within {furthest:.1e}")
    assert relative < 1e-5
    assert furthest < 1e-4
    assert theirs[-6:].mean() < theirs[:6].mean() - 0.1, (
        "nothing was learnt, so nothing was compared"
    )


def _examples() -> Iterator[Example]:
    for row, prompt_len in zip(CURVES["ids"].tolist(), CURVES["prompt_len"].tolist(), strict=True):
        ids = tuple(token for token in row if token >= 0)
        yield Example(ids, (IGNORED,) * prompt_len + ids[prompt_len:], prompt_len)


def _begin_as_pyreft(model: EditedModel, case: str) -> None:
    rotation = "rotation.parametrizations.weight"
    names = {"original": f"{rotation}.original", "base": f"{rotation}.0.base"}
    for k, edit in enumerate(model.edits):
        state = {
            names.get(name, name): tensor for name, tensor in _recorded(case, "initial", k).items()
        }
        edit.module.load_state_dict(state)


def _distances(model: EditedModel, case: str) -> Iterator[float]:
    for k, edit in enumerate(model.edits):
        ours, theirs = edit.module.weights().tensors(), _recorded(case, "final", k)
        assert ours.keys() == theirs.keys()
        yield from ((ours[name] - theirs[name]).abs().max().item() for name in ours)


def _recorded(case: str, stage: str, k: int) -> dict[str, Tensor]:
    prefix = f"{case}/{stage}/{k}/"
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in CURVES.items()
        if name.startswith(prefix)
    }
