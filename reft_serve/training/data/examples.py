"""Training examples as token ids: the seam between reading data and fitting weights. No torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["IGNORED", "Example", "Preference"]

# The label of a token that carries no loss, as torch's cross-entropy has it.
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its answer.

    Args:
        input_ids: the prompt's tokens and the answer's.
        labels: as long as `input_ids`: the token itself where its prediction is learnt, else
            `IGNORED`.
        prompt_len: the tokens before generation starts, which is the length that the position rule
            sees when serving.
        weight: factor on this example's loss.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    prompt_len: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, the first of them better."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
