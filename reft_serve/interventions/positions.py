"""Position rules: which tokens of a request an adapter edits. Training and serving both ask here;
no torch.

The rules are pyreft's (`pyreft.dataset.parse_positions` and `get_intervention_locations`), with the
spellings that its datasets and README use in code:

=========  ==================================================================================
`fN`       the first min(N, L // 2) prompt tokens
`lN`       the last min(N, L // 2) prompt tokens before L
`fN+lN`    both; untied, the prefix and the suffix have separate interventions
`first`    token 0
`last`     token L - 1
`all`      every prompt token
`0,3,-1`   those indices, negative ones from L; an index outside the prompt is dropped
=========  ==================================================================================

L is the prompt's length minus `last_offset`: 0 for pyreft's paper recipes (the suffix ends at the
prompt's last token), 1 for its `ReftSupervisedDataset`, `ReftGenerationDataset` and
`ReftClassificationDataset` (it ends one token earlier); the README's explicit `[len - 1]` is
`last`. The half rule (L // 2) holds for `f`, `l` and both, so a short prompt is never edited twice
at one token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Literal, NamedTuple

from reft_serve.errors import PositionsInvalid

__all__ = ["Part", "Phase", "PositionRule", "Span"]

Phase = Literal["prompt", "all", "generated"]

_FIRST_LAST = re.compile(r"(?:f(\d{1,6}))?(\+)?(?:l(\d{1,6}))?", re.ASCII)
_INDICES = re.compile(r"-?\d{1,9}(,-?\d{1,9})*", re.ASCII)
_MAX_INDICES = 4096
_MAX_CHARACTERS = 12 * _MAX_INDICES
_END = 1 << 62


class Part(IntEnum):
    """Which half of an untied rule a token belongs to. Tied rules have `PREFIX` only."""

    PREFIX = 0
    SUFFIX = 1


class Span(NamedTuple):
    """Edited tokens `start <= index < stop` of one request."""

    start: int
    stop: int
    part: Part


@dataclass(frozen=True, slots=True)
class PositionRule:
    """One adapter's position rule.

    Args:
        spec: a spelling of the table above.
        tied: one set of weights for prefix and suffix (pyreft's `share_weights`); False only with
            `fN+lN`.
        last_offset: tokens between the suffix's end and the prompt's end, 0 or more.
        phase: `prompt` edits prompt tokens only; `all` edits generated tokens too (each when it is
            fed back); `generated` edits those alone (pyreft's `intervene_on_prompt=False`).

    Raises:
        PositionsInvalid: with a sentence that says what is wrong.
    """

    spec: str
    tied: bool = True
    last_offset: int = 0
    phase: Phase = "prompt"

    def __post_init__(self) -> None:
        if len(self.spec) > _MAX_CHARACTERS:
            raise PositionsInvalid(
                f"positions have {len(self.spec):,} characters: at most {_MAX_CHARACTERS:,} are "
                "allowed"
            )
        kind, numbers = _parse(self.spec)
        untiable = kind == "fl" and all(numbers)
        if not self.tied and not untiable:
            raise PositionsInvalid(
                f"positions {self.spec!r} cannot be untied: only fN+lN has both a prefix and a "
                "suffix"
            )
        if not 0 <= self.last_offset <= 1024:
            raise PositionsInvalid(
                f"last_offset must be between 0 and 1024, not {self.last_offset}"
            )
        if self.last_offset and kind == "all":
            raise PositionsInvalid("last_offset has no meaning with positions 'all'")
        if self.phase not in ("prompt", "all", "generated"):
            raise PositionsInvalid(f"phase must be prompt, all or generated, not {self.phase!r}")
        if self.phase != "prompt" and not self.tied:
            raise PositionsInvalid(
                f"phase {self.phase!r} needs tied positions: a generated token is in neither half"
            )

    @property
    def edits_generated(self) -> bool:
        """True if tokens after the prompt are edited."""
        return self.phase != "prompt"

    def spans(self, prompt_len: int) -> list[Span]:
        """The edited tokens of a request with `prompt_len` prompt tokens: ascending, disjoint, and
        as few spans as can be, so that equal edits have equal spans.

        The last span is open (its stop is beyond any length) where generated tokens are edited.
        """
        spans = [] if self.phase == "generated" else self._prompt_spans(prompt_len)
        if self.edits_generated:
            spans.append(Span(prompt_len, _END, Part.PREFIX))
        return _joined(spans)

    def indices(self, prompt_len: int) -> tuple[list[int], list[int]]:
        """The edited prompt tokens as (prefix, suffix) index lists; a tied rule has them all in the
        first.
        """
        parts: tuple[list[int], list[int]] = ([], [])
        for span in self._prompt_spans(prompt_len):
            parts[span.part].extend(range(span.start, span.stop))
        return parts

    def _prompt_spans(self, prompt_len: int) -> list[Span]:
        kind, numbers = _parse(self.spec)
        length = max(prompt_len - self.last_offset, 0)
        suffix_part = Part.PREFIX if self.tied else Part.SUFFIX
        if kind == "all":
            spans = [Span(0, prompt_len, Part.PREFIX)]
        elif kind == "fl":
            first, last = (min(length // 2, n) for n in numbers)
            spans = [Span(0, first, Part.PREFIX), Span(length - last, length, suffix_part)]
        else:
            chosen = sorted({n if n >= 0 else length + n for n in numbers})
            spans = [Span(n, n + 1, Part.PREFIX) for n in chosen if 0 <= n < prompt_len]
        return [span for span in spans if span.start < span.stop]


def _joined(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for span in spans:
        if joined and (joined[-1].stop, joined[-1].part) == (span.start, span.part):
            joined[-1] = joined[-1]._replace(stop=span.stop)
        else:
            joined.append(span)
    return joined


@lru_cache(maxsize=4096)
def _parse(spec: str) -> tuple[Literal["fl", "all", "at"], tuple[int, ...]]:
    if spec == "all":
        return "all", ()
    if spec in ("first", "last"):
        return "at", (0 if spec == "first" else -1,)
    match = _FIRST_LAST.fullmatch(spec)
    if match and spec and bool(match[2]) == bool(match[1] and match[3]):
        first = int(match[1] or 0)
        last = int(match[3] or 0)
        if first or last:
            return "fl", (first, last)
        raise PositionsInvalid(f"positions {spec!r} name no token")
    if _INDICES.fullmatch(spec):
        numbers = tuple(int(n) for n in spec.split(","))
        if len(numbers) > _MAX_INDICES:
            raise PositionsInvalid(
                f"positions list {len(numbers)} indices; at most {_MAX_INDICES} are allowed"
            )
        return "at", numbers
    raise PositionsInvalid(
        f"positions {spec[:64]!r} are not understood: write fN, lN, fN+lN, first, last, all, or "
        "indices such as 0,3,-1"
    )
