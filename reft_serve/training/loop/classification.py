"""The losses of a classifier head, and its metrics on held-out texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    logsigmoid,
    mse_loss,
)
from torch.nn.utils.rnn import pad_sequence

from reft_serve.training.data.batching import Batch
from reft_serve.training.data.examples import IGNORED, Example, Preference
from reft_serve.training.data.labelled import LabelledExample
from reft_serve.training.loop.objectives import Collate
from reft_serve.training.model.classifier import ClassifierModel, LabelledBatch
from reft_serve.training.plan import HeadPlan

__all__ = ["Labels", "Reward", "matthews"]


class Labels:
    """The mean over the texts of an optimiser step: cross-entropy of the class, of each label, or
    squared error.
    """

    def __init__(self, head: HeadPlan) -> None:
        self._problem, self._outputs = head.problem_type, len(head.labels)
        counted = {
            "single_label_classification": 3 * self._outputs,
            "multi_label_classification": 3 * self._outputs + 1,
            "regression": 5 * self._outputs,
        }
        self.width = 2 + counted[self._problem]

    def tokens(self, item: LabelledExample) -> int:
        """All of the text."""
        return len(item.input_ids)

    def batch(self, items: Sequence[LabelledExample], collate: Collate) -> Batch:
        """One text per item."""
        if self._problem == "multi_label_classification":
            goals = torch.zeros(len(items), self._outputs)
            for row, item in zip(goals, items, strict=True):
                row[[int(k) for k in item.goal]] = 1
        else:
            goals = torch.tensor([item.goal for item in items])
        if self._problem == "single_label_classification":
            goals = goals[:, 0].long()
        return _laid_out([(item.input_ids, item.token_types) for item in items], goals, collate)

    def count(self, batch: Batch) -> int:
        """Texts."""
        return len(batch.lengths)

    def loss(self, logits_BC: Tensor, batch: Batch, step_count: Tensor) -> Tensor:
        """Its share of the mean over the step."""
        return self._losses(logits_BC, batch).sum() / step_count

    @torch.no_grad()
    def sums(self, model: ClassifierModel, batch: Batch) -> Tensor:
        """Loss and texts; and counts by class or label, or the moments of a correlation."""
        assert isinstance(batch, LabelledBatch)
        logits_BC = model(batch).double()
        goals = batch.goals
        first = logits_BC.new_tensor([self._losses(logits_BC, batch).sum().item(), len(logits_BC)])
        if self._problem == "single_label_classification":
            answers = logits_BC.argmax(1)
            counts = [
                torch.bincount(of, minlength=self._outputs)
                for of in (goals[goals == answers], goals, answers)
            ]
            return torch.cat([first, *(each.double() for each in counts)])
        if self._problem == "regression":
            y = goals.double()
            moments = [logits_BC, y, logits_BC * logits_BC, y * y, logits_BC * y]
            return torch.cat([first, *(each.sum(0) for each in moments)])
        said, true = logits_BC > 0, goals > 0.5
        counts = [
            (said & true).sum(0),
            (said & ~true).sum(0),
            (~said & true).sum(0),
            (said == true).all(1).sum()[None],
        ]
        return torch.cat([first, *(each.double() for each in counts)])

    def metrics(self, total: Tensor) -> dict[str, float]:
        """`loss`, and accuracy, F1 and Matthews' correlation; exact matches and F1; or Pearson's
        correlation.
        """
        loss, texts, *rest = total.tolist()
        texts = max(texts, 1)
        metrics = {"loss": loss / texts}
        if self._problem == "single_label_classification":
            right, true, said = torch.tensor(rest, dtype=torch.float64).view(3, self._outputs)
            f1 = 2 * right / (true + said).clamp(min=1)
            return metrics | {
                "accuracy": right.sum().item() / texts,
                "f1": f1[1].item() if self._outputs == 2 else f1.mean().item(),
                "matthews": matthews(right, true, said),
            }
        if self._problem == "regression":
            x, y, xx, yy, xy = torch.tensor(rest, dtype=torch.float64).view(5, self._outputs)
            spread = ((texts * xx - x * x) * (texts * yy - y * y)).clamp(min=0).sqrt()
            r = torch.where(
                spread > 0,
                (texts * xy - x * y) / spread.clamp(min=1e-300),
                torch.zeros_like(spread),
            )
            return metrics | {"pearson": r.mean().item(), "mean_squared_error": metrics["loss"]}
        hits, false, missed = (
            torch.tensor(rest[:-1], dtype=torch.float64).view(3, self._outputs).sum(1).tolist()
        )
        return metrics | {
            "exact_match": rest[-1] / texts,
            "f1": 2 * hits / max(2 * hits + false + missed, 1),
        }

    def _losses(self, logits_BC: Tensor, batch: Batch) -> Tensor:
        assert isinstance(batch, LabelledBatch)
        if self._problem == "single_label_classification":
            return cross_entropy(logits_BC, batch.goals, reduction="none")
        measure: Any = (
            mse_loss if self._problem == "regression" else binary_cross_entropy_with_logits
        )
        losses: Tensor = measure(logits_BC, batch.goals.to(logits_BC.dtype), reduction="none")
        return losses.mean(1)


class Reward:
    """Bradley and Terry's loss: the difference of two rewards is the log-odds that the first answer
    is the better one.
    """

    width = 3

    def tokens(self, item: Preference) -> int:
        """The longer of the two conversations."""
        return len(item.prompt_ids) + max(len(item.chosen_ids), len(item.rejected_ids))

    def batch(self, items: Sequence[Preference], collate: Collate) -> Batch:
        """Two texts per item, the better one first."""
        texts = [
            item.prompt_ids + ids for item in items for ids in (item.chosen_ids, item.rejected_ids)
        ]
        return _laid_out([(ids, ()) for ids in texts], torch.zeros(len(texts)), collate)

    def count(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch.lengths) // 2

    def loss(self, logits_BC: Tensor, batch: Batch, step_count: Tensor) -> Tensor:
        """Its share of the mean over the step."""
        return -logsigmoid(_margins(logits_BC)).sum() / step_count

    @torch.no_grad()
    def sums(self, model: ClassifierModel, batch: Batch) -> Tensor:
        """Loss, pairs, pairs in the right order."""
        assert isinstance(batch, LabelledBatch)
        margins = _margins(model(batch).double())
        return margins.new_tensor(
            [-logsigmoid(margins).sum().item(), len(margins), (margins > 0).sum().item()]
        )

    def metrics(self, total: Tensor) -> dict[str, float]:
        """Loss per pair, and the share of pairs in the right order."""
        loss, pairs, right = total.tolist()
        return {"loss": loss / max(pairs, 1), "accuracy": right / max(pairs, 1)}


def _margins(logits_B1: Tensor) -> Tensor:
    return logits_B1[0::2, 0] - logits_B1[1::2, 0]


def _laid_out(
    texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], goals: Tensor, collate: Collate
) -> LabelledBatch:
    plain = collate([Example(ids, (IGNORED,) * len(ids), len(ids)) for ids, _ in texts])
    types = None
    if any(type_ids for _, type_ids in texts):
        types = pad_sequence(
            [torch.tensor(type_ids or (0,) * len(ids)) for ids, type_ids in texts], batch_first=True
        )
    # With a reference, the Trainer counts no tokens as right or wrong.
    own = {each.name: getattr(plain, each.name) for each in fields(plain)} | {
        "reference": torch.zeros(0)
    }
    return LabelledBatch(**own, goals=goals, token_types=types)


def matthews(right_C: Tensor, true_C: Tensor, said_C: Tensor) -> float:
    """Matthews' correlation coefficient, as scikit-learn has it; 0 where it is undefined.

    Args:
        right_C: for each class, how often it is both the goal and the answer.
        true_C: how often it is the goal.
        said_C: how often it is the answer.
    """
    right, total = right_C.sum().item(), true_C.sum().item()
    spread = (total**2 - (said_C @ said_C).item()) * (total**2 - (true_C @ true_C).item())
    return (right * total - (true_C @ said_C).item()) / math.sqrt(spread) if spread > 0 else 0.0
