"""Seeded requests on a CPU, whose prompts arrive in chunks.

vLLM samples a token after every chunk and throws all but the last away. To undo what that took from
a request's generator it moves the generator's offset back, which CUDA's generators have and the
CPU's do not: the step raises, and the engine ends (vLLM 0.32, `GPUModelRunner._bookkeeping_sync`).
On a CPU the generator's state is kept before and put back after, so that a seed gives the same
answer however its prompt was cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

__all__ = ["wrap_bookkeeping_sync", "wrap_sample"]


def wrap_sample(sample: Callable[..., Any]) -> Callable[..., Any]:
    """Around `GPUModelRunner._sample`."""

    def _sample(self: Any, *args: Any, **options: Any) -> Any:
        kept = [(each, each.get_state()) for each in _thrown_away(self).values()]
        sampled = sample(self, *args, **options)
        for generator, state in kept:
            generator.set_state(state)
        return sampled

    return _sample


def wrap_bookkeeping_sync(bookkeeping: Callable[..., Any]) -> Callable[..., Any]:
    """Around `GPUModelRunner._bookkeeping_sync`, which finds nothing left to undo."""

    def _bookkeeping_sync(self: Any, *args: Any, **options: Any) -> Any:
        hidden = _thrown_away(self)
        for row in hidden:
            del self.input_batch.generators[row]
        try:
            return bookkeeping(self, *args, **options)
        finally:
            self.input_batch.generators.update(hidden)

    return _bookkeeping_sync


def _thrown_away(runner: Any) -> dict[int, torch.Generator]:
    """The generators on a CPU, by row, of those requests whose token of this step does not
    count.
    """
    generators: dict[int, torch.Generator] = runner.input_batch.generators
    if runner.device.type != "cpu" or not generators:
        return {}
    rows = np.nonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])[0]
    return {int(row): generators[row] for row in map(int, rows) if row in generators}
