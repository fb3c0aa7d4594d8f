"""Answers judged as the ReFT paper's code judges them (pyreft,
`examples/loreft/compute_metrics.py`). No torch.

==========  ======================================================================================
`exact`     the answer is the reference, white space around them aside
`number`    the last number of the answer is within 0.001 of the reference; if the reference
            is not a number (AQuA), the first of the letters A to E is the reference
`label`     the first word of the answer is the class
`matthews`  judged as `label`; Matthews' correlation next to the accuracy (CoLA's)
`pearson`   the first number of the answer; Pearson's correlation with the references (STS-B's)
`none`      not judged here: AlpacaEval's annotator reads the answers
==========  ======================================================================================
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import StatisticsError, correlation

from reft_serve.recipes.recipe import Metric, Task

__all__ = ["Accuracy", "Score", "Verdict", "judge", "score", "wilson"]

_TOLERANCE = 1e-3
_NUMBER = re.compile(r"-?\d+\.?\d*", re.ASCII)
_LETTER = re.compile(r"[A-E]")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer judged: what was taken from it, and whether that is right. `correct` is None if it
    is not judged.
    """

    extracted: str
    correct: bool | None


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of right answers, and Wilson's bounds of it with 95 % confidence."""

    correct: int
    share: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Score:
    """The verdicts of one set; `correlation` is Matthews' or Pearson's, if that is the metric."""

    asked: int
    accuracy: Accuracy | None
    correlation: float | None


def judge(task: Task, completion: str, reference: str) -> Verdict:
    """Judge a completion, which begins after the prompt."""
    answer = _after(task.trigger, completion)
    if task.metric == "exact":
        return Verdict(answer.strip(), answer.strip() == reference.strip())
    if task.metric == "number":
        return _number(answer, reference.strip())
    if task.metric in ("label", "matthews"):
        word = _WORD.search(answer.lower())
        label = word[0] if word else ""
        return Verdict(label, label == reference.strip().lower())
    if task.metric == "pearson":
        number = _NUMBER.search(answer)
        return Verdict(number[0] if number else "", None)
    return Verdict(answer, None)


def score(metric: Metric, judged: Sequence[tuple[Verdict, str]]) -> Score:
    """The score of one or more verdicts with their references. A failed request is a verdict of
    nothing extracted, which counts as wrong.
    """
    asked = len(judged)
    accuracy = None
    if metric not in ("none", "pearson"):
        correct = sum(bool(verdict.correct) for verdict, _ in judged)
        accuracy = Accuracy(correct, correct / asked, *wilson(correct, asked))
    return Score(asked, accuracy, _correlation(metric, judged))


def wilson(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a share; 95 % confidence unless another z is given."""
    share = successes / trials
    zz = z * z
    centre = (share + zz / (2 * trials)) / (1 + zz / trials)
    half = (
        z / (1 + zz / trials) * math.sqrt(share * (1 - share) / trials + zz / (4 * trials * trials))
    )
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _after(trigger: str, completion: str) -> str:
    if not trigger:
        return completion
    _, separator, answer = completion.partition(trigger)
    return answer.lstrip() if separator else ""


def _number(answer: str, reference: str) -> Verdict:
    if not _is_number(reference):
        letter = _LETTER.search(answer)
        choice = letter[0] if letter else ""
        return Verdict(choice, choice == reference)
    numbers = _NUMBER.findall(answer.replace(",", ""))
    if not numbers:
        return Verdict("", False)
    return Verdict(numbers[-1], abs(float(reference) - float(numbers[-1])) <= _TOLERANCE)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _correlation(metric: Metric, judged: Sequence[tuple[Verdict, str]]) -> float | None:
    """Pearson's, with 0 for an answer without a number, or Matthews'; 0 if one side never
    varies.
    """
    if metric == "matthews":
        return _matthews(
            [verdict.extracted for verdict, _ in judged],
            [reference.lower() for _, reference in judged],
        )
    if metric != "pearson":
        return None
    try:
        return correlation(
            [float(verdict.extracted or 0) for verdict, _ in judged],
            [float(reference) for _, reference in judged],
        )
    except StatisticsError:
        return 0.0


def _matthews(predicted: Sequence[str], true: Sequence[str]) -> float:
    """Of any number of classes (Gorodkin 2004, equation 8); all answers of no class are one class
    more.
    """
    known = set(true)
    predicted = [name if name in known else "" for name in predicted]
    of_predicted = Counter(predicted)
    of_true = Counter(true)
    total = len(true)
    right = sum(p == t for p, t in zip(predicted, true, strict=True))
    covariance = right * total - sum(count * of_true[name] for name, count in of_predicted.items())
    spreads = [
        total * total - sum(count * count for count in counts.values())
        for counts in (of_predicted, of_true)
    ]
    return covariance / math.sqrt(spreads[0] * spreads[1]) if all(spreads) else 0.0
