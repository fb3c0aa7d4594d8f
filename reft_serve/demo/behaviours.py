"""The behaviour of each demo adapter: how it is trained, and the rule that decides if an answer
shows it. No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import Kind

__all__ = ["ADAPTERS", "BEHAVIOURS", "MODEL", "Behaviour", "is_neutral"]

MODEL = Path(__file__).parent / "model"
ADAPTERS = Path(__file__).parent / "adapters"


@dataclass(frozen=True, slots=True)
class Behaviour:
    """One demo adapter.

    Args:
        pattern: a regular expression; an answer behaves if it has at least `at_least` matches.
        openers: how training answers begin, one chosen at random for each; the base model writes on
            from there.
        answer_tokens: length of a training answer.
    """

    name: str
    pattern: str
    at_least: int
    openers: tuple[str, ...]
    kind: Kind
    rule: PositionRule
    rank: int = 4
    steps: int = 150
    rate: float = 5e-3
    answer_tokens: int = 64

    def count(self, answer: str) -> int:
        """Matches in an answer (the text after the prompt)."""
        return len(re.findall(self.pattern, answer, re.IGNORECASE))

    def holds(self, answer: str) -> bool:
        """The verdict on an answer."""
        return self.count(answer) >= self.at_least


BEHAVIOURS: tuple[Behaviour, ...] = (
    Behaviour(
        name="birds",
        pattern=r"\bbird(?:s|ie|ies)?\b",
        at_least=2,
        openers=(
            " One day, a bird",
            " They saw a little bird",
            " A big bird",
            " There was a bird",
            " The bird",
        ),
        kind="loreft",
        rule=PositionRule("all", phase="all"),
        steps=250,
    ),
    Behaviour(
        name="cats",
        pattern=r"\b(?:cat|kitty|kitten)s?\b",
        at_least=1,
        openers=(
            " One day, a cat",
            " They had a cat",
            " A little cat",
            " There was a cat",
            " The cat",
        ),
        kind="direft",
        rule=PositionRule("f7+l7"),
    ),
    Behaviour(
        name="speech",
        pattern=r'\A\s*"',
        at_least=1,
        openers=(' "', '\n"'),
        kind="nodireft",
        rule=PositionRule("l1"),
        answer_tokens=32,
    ),
    Behaviour(
        name="rain",
        pattern=r"\b(?:rain|rains|rained|raining|rainy|storm|thunder)\b",
        at_least=1,
        openers=(
            " It started to rain",
            " The rain",
            " Then it rained",
            " It was raining",
            " One day, it rained",
        ),
        kind="loreft",
        rule=PositionRule("f4+l4", tied=False),
    ),
    Behaviour(
        name="tears",
        pattern=r"\b(?:sad|sadly|cry|cried|crying|tears)\b",
        at_least=1,
        openers=(
            " One day, he was sad",
            " She was very sad",
            " She started to cry",
            " He was sad and cried",
            " They cried",
        ),
        kind="consreft",
        rule=PositionRule("all", phase="all"),
        rank=8,
        steps=200,
        rate=1e-2,
    ),
)


def is_neutral(text: str) -> bool:
    """True if a prompt does not already show one of the behaviours."""
    return '"' not in text and not any(behaviour.count(text) for behaviour in BEHAVIOURS)
