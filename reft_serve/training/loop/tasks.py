"""The tasks that train a classifier head: from files to a plan with a head and encoded items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from reft_serve.adapters.head import HeadSpec
from reft_serve.datafiles.formats import Rows
from reft_serve.errors import ClientError, DataInvalid
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import ACTIVATION_CODES
from reft_serve.training.data.encoding import encode
from reft_serve.training.data.examples import Preference
from reft_serve.training.data.labelled import Goals, LabelledExample, encode_labelled, goals_of
from reft_serve.training.model.classifier import head_plan
from reft_serve.training.plan import Plan

__all__ = ["HeadAsk", "HeadTask", "Prepared", "prepare"]

HeadTask = Literal["classification", "regression", "reward"]
# pyreft's runs on GLUE edit the first three tokens, the classified one among them.
_ENCODER_RULE = PositionRule("f3")
_REWARD = Goals("regression", ("reward",))


@dataclass(frozen=True, slots=True)
class HeadAsk:
    """The options of a head; None and () choose the default. The activation `none` means a single
    linear layer.

    Raises:
        ClientError: an option has an unknown value.
    """

    task: str
    labels: tuple[str, ...] = ()
    reads: str | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        if self.task not in get_args(HeadTask):
            raise ClientError(
                f"task {self.task[:64]!r} is not one of {', '.join(get_args(HeadTask))}"
            )
        if self.reads not in (None, "first", "last", "mean"):
            raise ClientError(f"a head reads first, last or mean, not {self.reads[:64]!r}")
        if self.activation not in (None, "none", *ACTIVATION_CODES):
            raise ClientError(
                f"the head's activation {self.activation!r} is not none or one of "
                f"{', '.join(ACTIVATION_CODES)}"
            )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan with its head, and for each file its items, notes about skipped rows, and its
    fingerprint.
    """

    plan: Plan
    items: tuple[Sequence[LabelledExample] | Sequence[Preference], ...]
    notes: tuple[str, ...]
    fingerprints: tuple[str, ...]


def prepare(
    ask: HeadAsk,
    base: Path,
    plan: Plan,
    files: Sequence[Rows],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    rule_given: bool,
    now: datetime | None = None,
) -> Prepared:
    """Choose the head for the base and the training file, the first of `files`, and encode all
    files.

    Args:
        rule_given: False if the plan's position rule is a default, which an encoder replaces.
        now: the time that a chat template uses, as in `encoding.encode`.

    Raises:
        DataInvalid: every fault of a file.
        ClientError: the options contradict each other or the base.
    """
    if ask.task == "reward":
        goals = _REWARD
    else:
        goals = goals_of(
            files[0], "regression" if ask.task == "regression" else "classification", ask.labels
        )
    head = head_plan(
        base,
        problem_type=goals.problem_type,
        labels=goals.labels,
        reads=ask.reads,
        activation=ask.activation,
    )
    if ask.activation == "none":
        head = replace(head, activation=None)
    try:
        HeadSpec(**asdict(head))
    except ValidationError as exc:
        raise ClientError(
            "; ".join(each["msg"].removeprefix("Value error, ") for each in exc.errors())
        ) from exc
    ready = replace(plan, head=head, method="reward" if ask.task == "reward" else "labels")
    if not rule_given and head.reads != "last":
        ready = replace(ready, adapter=replace(ready.adapter, rule=_ENCODER_RULE))
    if ask.task == "reward":
        return _preferences(ready, files, tokenizer, max_tokens, now)
    data = [encode_labelled(rows, tokenizer, goals, max_tokens=max_tokens) for rows in files]
    return Prepared(
        ready,
        tuple(each.examples for each in data),
        tuple(note for each in data for note in each.notes()),
        tuple(each.fingerprint for each in data),
    )


def _preferences(
    plan: Plan,
    files: Sequence[Rows],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    now: datetime | None,
) -> Prepared:
    data = [encode(rows, tokenizer, max_tokens=max_tokens, now=now) for rows in files]
    for each in data:
        if not each.preferences:
            raise DataInvalid(
                each.where, ["a reward model needs preference rows, but the file has none"]
            )
    return Prepared(
        plan,
        tuple(each.preferences for each in data),
        tuple(note for each in data for note in each.notes()),
        tuple(each.fingerprint for each in data),
    )
