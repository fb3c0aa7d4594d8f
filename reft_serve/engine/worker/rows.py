"""From the requests of a step to the rows it edits.

A request is in this step with tokens [computed, computed + scheduled) of itself. Its edited tokens
follow from its *prompt's* length, which a preemption does not change: tokens it had generated
before are part of its prefill then, and are still not prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reft_serve.engine.adapter_ref import AdapterRef
from reft_serve.interventions.positions import Part

__all__ = ["Rows", "StepRequest", "rows_of"]


@dataclass(frozen=True, slots=True)
class StepRequest:
    """One request's share of a step. `first_row` is where its tokens start among the step's
    tokens.
    """

    identity: AdapterRef
    path: str
    prompt_len: int
    computed: int
    scheduled: int
    first_row: int


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Edited rows of a step: int32 token indices, int32 keys, float32 strengths, all (T,)."""

    row_T: NDArray[np.int32]
    key_T: NDArray[np.int32]
    scale_T: NDArray[np.float32]


def rows_of(requests: list[StepRequest], slot_of: Callable[[StepRequest], int]) -> Rows | None:
    """The step's rows, or None if no token of the step is edited. `slot_of` is asked only for
    requests with rows.
    """
    rows: list[NDArray[np.int32]] = []
    keys: list[NDArray[np.int32]] = []
    scales: list[NDArray[np.float32]] = []
    for request in requests:
        begin = request.computed
        end = request.computed + request.scheduled
        shift = request.first_row - begin
        slot = -1
        for span in request.identity.spans(request.prompt_len):
            low = max(span.start, begin)
            high = min(span.stop, end)
            if low < high:
                slot = slot_of(request) if slot < 0 else slot
                rows.append(np.arange(low + shift, high + shift, dtype=np.int32))
                keys.append(np.full(high - low, slot * len(Part) + span.part, dtype=np.int32))
                scales.append(np.full(high - low, request.identity.strength, dtype=np.float32))
    return (
        Rows(np.concatenate(rows), np.concatenate(keys), np.concatenate(scales)) if rows else None
    )
