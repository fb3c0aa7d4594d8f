"""Training objectives: batches from items of the data, the loss, and the metrics on held-out
data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from reft_serve.training.data.batching import Batch
from reft_serve.training.data.examples import Example
from reft_serve.training.model.edited_model import EditedModel

__all__ = ["Collate", "Objective", "Supervised"]

Item_contra = TypeVar("Item_contra", contravariant=True)
Collate = Callable[[Sequence[Example]], Batch]


class Objective(Protocol, Generic[Item_contra]):
    """One method of training.

    `sums` are added up over held-out batches; `metrics` turns their total into numbers, `loss`
    among them. `width`: how many sums there are.
    """

    width: int

    def tokens(self, item: Item_contra) -> int:
        """Tokens that the model reads for an item."""
        ...

    def batch(self, items: Sequence[Item_contra], collate: Collate) -> Batch: ...

    def count(self, batch: Batch) -> int:
        """The batch's share of the denominator of the loss."""
        ...

    def loss(self, logprobs_Y: Tensor, batch: Batch, step_count: Tensor) -> Tensor:
        """A micro-batch's share of the loss of an optimiser step, whose micro-batches count
        `step_count` together.
        """
        ...

    def sums(self, model: EditedModel, batch: Batch) -> Tensor:
        """A held-out batch's contribution to the totals, a vector."""
        ...

    def metrics(self, total: Tensor) -> dict[str, float]: ...


class Supervised:
    """Cross-entropy of the answers: the mean over all tokens with a loss in an optimiser step, each
    times its weight.
    """

    width = 3

    def tokens(self, item: Example) -> int:
        return len(item.input_ids)

    def batch(self, items: Sequence[Example], collate: Collate) -> Batch:
        """One example per item."""
        return collate(items)

    def count(self, batch: Batch) -> int:
        """Tokens with a loss."""
        return len(batch.target_ids)

    def loss(self, logprobs_Y: Tensor, batch: Batch, step_count: Tensor) -> Tensor:
        """Its share of the mean over the step."""
        return -(logprobs_Y * batch.target_weights).sum() / step_count

    def sums(self, model: EditedModel, batch: Batch) -> Tensor:
        """Weighted loss, tokens, tokens that were the likeliest."""
        logprobs_Y, hits_Y = model.score(batch)
        return logprobs_Y.new_tensor(
            [-(logprobs_Y * batch.target_weights).sum().item(), len(hits_Y), hits_Y.sum().item()]
        ).double()

    def metrics(self, total: Tensor) -> dict[str, float]:
        """Loss per token and the share of tokens that were the likeliest."""
        loss, tokens, hits = total.tolist()
        return {"loss": loss / max(tokens, 1), "token_accuracy": hits / max(tokens, 1)}
