"""Hidden states that no weight in training can change, kept from one epoch to the next.

What leaves the lowest edited layer, before its edit, is the frozen base's alone. Where few layers
are edited it is much of the forward pass, and each epoch would compute it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reft_serve.interventions.positions import PositionRule
from reft_serve.training.data.batching import Batch, collate
from reft_serve.training.data.examples import Example
from reft_serve.training.model.classifier import ClassifierModel
from reft_serve.training.model.edited_model import EditedModel
from reft_serve.training.plan import Plan, much_is_below

__all__ = ["StateCache", "worth_keeping"]


def worth_keeping(
    model: EditedModel | ClassifierModel, plan: Plan, examples: int, tokens: int, processes: int
) -> bool:
    """True if an epoch's `examples` repeat, enough work is saved, and the `tokens` read fit into
    `plan.keep_states` GiB.

    Not with a LoRA, which learns below too. Not in float16, where the Trainer's autocast has other
    roundings than ours.
    """
    steps_per_epoch = examples / (plan.batch * plan.accumulate * processes)
    epochs = plan.epochs if plan.max_steps is None else plan.max_steps / steps_per_epoch
    fit = tokens * model.state_bytes / 2**30 <= plan.keep_states
    much = much_is_below(model.lowest, model.depth)
    return epochs > processes and much and fit and plan.lora is None and plan.dtype != "float16"


class StateCache:
    """Cache in main memory of each example's hidden states below the lowest edited layer."""

    def __init__(self, model: EditedModel) -> None:
        self._model = model
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def join(self, batch: Batch) -> Batch:
        """The batch with its states; those that are met for the first time are computed."""
        new = [ids for ids in dict.fromkeys(batch.token_ids) if ids not in self._kept]
        # One at a time on CPU: batching changes the last bits, and a resumed run batches
        # differently.
        some = 1 if self._model.device.type == "cpu" else len(batch.token_ids)
        for start in range(0, len(new), some):
            ids = new[start : start + some]
            self._kept.update(zip(ids, self._compute(ids, packed=batch.packed), strict=True))
        rows = [self._kept[ids] for ids in batch.token_ids]
        states_BTD = (
            torch.cat(rows).unsqueeze(0) if batch.packed else pad_sequence(rows, batch_first=True)
        )
        return replace(batch, states=states_BTD.to(self._model.device))

    def _compute(self, token_ids: Sequence[tuple[int, ...]], *, packed: bool) -> list[Tensor]:
        """(T, D) of each."""
        examples = [Example(ids, ids, len(ids)) for ids in token_ids]
        batch = collate(examples, PositionRule("all"), packed=packed).to(self._model.device)
        states_BTD = self._model.frozen_states(batch).cpu()
        rows = torch.split(states_BTD[0], list(batch.lengths)) if packed else states_BTD
        return [row[:length].clone() for row, length in zip(rows, batch.lengths, strict=True)]
