"""Examples to batches: which examples share an optimiser step, and how their tokens lie in one
tensor.

Letters: B rows, T columns, N tokens of a batch, E edited tokens, Y tokens with a loss.

A *packed* batch is one row with the examples end to end, so nothing is padding; attention keeps
them apart (`attention.py`). Models without exchangeable attention get padded rows. All other code
knows tokens only by their index in the flattened (B * T) grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Sampler

from reft_serve.interventions.positions import Part, PositionRule
from reft_serve.training.data.examples import IGNORED, Example

__all__ = ["Batch", "StepSampler", "collate", "micro_batches"]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some examples as tensors.

    token_ids: of each example.
    packed: True if they lie end to end in one row.
    rows: the edited tokens of each part of the position rule.
    target_rows: tokens whose next token has a loss; target_ids that next token; target_weights
        its factor; target_of the example that it belongs to. All (Y,).
    reference: log-probability of each example's targets under the base model, if the method
        compares with it.
    states: hidden states below the lowest edited layer, (B, T, D), if they are known.
    """

    token_ids: tuple[tuple[int, ...], ...]
    input_ids: Tensor
    position_ids: Tensor
    packed: bool
    rows: tuple[Tensor, Tensor]
    target_rows: Tensor
    target_ids: Tensor
    target_weights: Tensor
    target_of: Tensor
    reference: Tensor | None = None
    states: Tensor | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each example."""
        return tuple(map(len, self.token_ids))

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The batch on `device`; accelerate calls it by this name."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in (
                "input_ids",
                "position_ids",
                "target_rows",
                "target_ids",
                "target_weights",
                "target_of",
            )
        }
        rows = (self.rows[0].to(device), self.rows[1].to(device))
        reference = None if self.reference is None else self.reference.to(device)
        return replace(self, rows=rows, reference=reference, **moved)

    def with_reference(self, reference: Tensor) -> Batch:
        """The batch with the outputs of its base model."""
        return replace(self, reference=reference)


def collate(examples: Sequence[Example], rule: PositionRule, *, packed: bool) -> Batch:
    """Lay `examples` out. Positions are those of serving: `rule.spans` of each prompt's length."""
    token_ids = tuple(example.input_ids for example in examples)
    lengths = [len(ids) for ids in token_ids]
    width = sum(lengths) if packed else max(lengths)
    ids_BT = torch.zeros(1 if packed else len(examples), width, dtype=torch.long)
    positions_BT = torch.zeros_like(ids_BT)
    parts: tuple[list[int], list[int]] = ([], [])
    targets: list[tuple[int, int, float, int]] = []
    start = 0
    for number, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        flat = slice(start, start + length)
        ids_BT.view(-1)[flat] = torch.tensor(example.input_ids)
        positions_BT.view(-1)[flat] = torch.arange(length)
        for span in rule.spans(example.prompt_len):
            parts[span.part].extend(range(start + span.start, start + min(span.stop, length)))
        targets += [
            (start + t - 1, label, example.weight, number)
            for t, label in enumerate(example.labels)
            if t and label != IGNORED
        ]
        start += length if packed else width
    columns: list[Sequence[float]] = (
        list(zip(*targets, strict=True)) if targets else [(), (), (), ()]
    )
    rows, ids, of = (torch.tensor(columns[i], dtype=torch.long) for i in (0, 1, 3))
    edited = (
        torch.tensor(parts[Part.PREFIX], dtype=torch.long),
        torch.tensor(parts[Part.SUFFIX], dtype=torch.long),
    )
    weights = torch.tensor(columns[2], dtype=torch.float32)
    return Batch(token_ids, ids_BT, positions_BT, packed, edited, rows, ids, weights, of)


class StepSampler(Sampler[list[int]]):
    """Micro-batches of indices. Which examples share an optimiser step is chance, as without
    packing; how a step is cut into micro-batches follows their lengths.

    Order is a function of the seed and the epoch alone, which resuming relies on.

    Args:
        lengths: tokens of each example.
        batch: most examples of a micro-batch. accumulate: micro-batches that each process takes for
            one optimiser step.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch: int,
        accumulate: int,
        seed: int,
        *,
        shuffle: bool,
        processes: int = 1,
    ) -> None:
        self._lengths = lengths
        self._batch = batch
        self._processes = processes
        self._per_step = batch * accumulate * processes
        self._seed = seed
        self._shuffle = shuffle
        # Which epoch comes next. Not a `set_epoch`: accelerate would call that, and forgets the
        # epoch of a resumed run.
        self.epoch = 0
        # accelerate reads these two of any batch sampler.
        self.batch_size = batch
        self.drop_last = False

    def __len__(self) -> int:
        # A step is a whole number of micro-batches.
        return math.ceil(len(self._lengths) / self._batch)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for start in range(0, len(order), self._per_step):
            step = order[start : start + self._per_step]
            yield from micro_batches(step, self._lengths, self._batch, self._processes)

    def _order(self) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._lengths)))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        order: list[int] = torch.randperm(len(self._lengths), generator=generator).tolist()
        return order


def micro_batches(
    indices: Sequence[int], lengths: Sequence[int], batch: int, processes: int
) -> Iterator[list[int]]:
    """Cut `indices` into parts of at most `batch`, of examples of like length, the longest first.

    Those that `processes` take at the same time hold about as many tokens, so that none waits for
    another.
    """
    ordered = sorted(indices, key=lambda i: (-lengths[i], i))
    for start in range(0, len(ordered), batch * processes):
        together = ordered[start : start + batch * processes]
        parts = -(-len(together) // batch)
        dealt: list[list[int]] = [[] for _ in range(parts)]
        for place, index in enumerate(together):
            turn, column = divmod(place, parts)
            dealt[column if turn % 2 == 0 else parts - 1 - column].append(index)
        yield from dealt
