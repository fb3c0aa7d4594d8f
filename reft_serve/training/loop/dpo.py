"""Direct preference optimisation (arXiv 2305.18290): the reference is the same base without edits,
so no second model.

What the reference gives never changes, so it is computed once, before the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from reft_serve.training.data.batching import Batch
from reft_serve.training.data.examples import IGNORED, Example, Preference
from reft_serve.training.loop.objectives import Collate
from reft_serve.training.model.edited_model import EditedModel

__all__ = ["Dpo"]


class Dpo:
    """The sigmoid loss over pairs, its mean over an optimiser step.

    A batch holds the chosen and the rejected answer of each pair as neighbours: examples 2i and 2i
    + 1.
    """

    width = 4

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._reference: dict[Preference, Tensor] = {}

    def consult(
        self, model: EditedModel, pairs: Sequence[Preference], collate: Collate, batch: int
    ) -> None:
        """Compute what the base gives for `pairs`. Every pair of a batch must have been here."""
        model.eval()
        for some in _batched(sorted(set(pairs) - self._reference.keys(), key=self.tokens), batch):
            laid = collate(_examples(some)).to(model.device)
            sums = _sums(model.base_score(laid), laid).cpu()
            self._reference.update(zip(some, sums.view(-1, 2), strict=True))
        model.train()

    def tokens(self, item: Preference) -> int:
        """Both answers, each with its prompt."""
        return 2 * len(item.prompt_ids) + len(item.chosen_ids) + len(item.rejected_ids)

    def batch(self, items: Sequence[Preference], collate: Collate) -> Batch:
        """Two examples per item, with the reference's sums."""
        reference = torch.cat([self._reference[item] for item in items])
        return collate(_examples(items)).with_reference(reference)

    def count(self, batch: Batch) -> int:
        return len(batch.lengths) // 2

    def loss(self, logprobs_Y: Tensor, batch: Batch, step_count: Tensor) -> Tensor:
        """Its share of the mean over the step."""
        return -logsigmoid(self._beta * _margins(logprobs_Y, batch)).sum() / step_count

    def sums(self, model: EditedModel, batch: Batch) -> Tensor:
        """Loss, pairs, pairs that prefer the chosen answer more than the base does, and by how much
        in all.
        """
        margins = _margins(model.score(batch)[0], batch)
        loss = -logsigmoid(self._beta * margins).sum()
        return torch.stack(
            [loss, loss.new_tensor(len(margins)), (margins > 0).sum(), self._beta * margins.sum()]
        ).double()

    def metrics(self, total: Tensor) -> dict[str, float]:
        """Loss per pair, the share of pairs with a positive margin, and the mean margin of the
        rewards.
        """
        loss, pairs, won, margin = total.tolist()
        return {"loss": loss / pairs, "accuracy": won / pairs, "margin": margin / pairs}


def _examples(pairs: Sequence[Preference]) -> list[Example]:
    return [
        Example(
            pair.prompt_ids + answer,
            (IGNORED,) * len(pair.prompt_ids) + answer,
            len(pair.prompt_ids),
        )
        for pair in pairs
        for answer in (pair.chosen_ids, pair.rejected_ids)
    ]


def _sums(logprobs_Y: Tensor, batch: Batch) -> Tensor:
    """Of each example's answer, (B,)."""
    return logprobs_Y.new_zeros(len(batch.lengths)).index_add(0, batch.target_of, logprobs_Y)


def _margins(logprobs_Y: Tensor, batch: Batch) -> Tensor:
    """Reward margin per pair: how much more than the base model the model prefers the chosen
    answer.
    """
    assert batch.reference is not None
    gains = (_sums(logprobs_Y, batch) - batch.reference).view(-1, 2)
    return gains[:, 0] - gains[:, 1]


def _batched(pairs: Sequence[Preference], size: int) -> Iterator[Sequence[Preference]]:
    return (pairs[start : start + size] for start in range(0, len(pairs), size))
