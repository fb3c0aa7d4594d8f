"""Rows with a label into token ids and targets, from which a classifier head learns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from reft_serve.datafiles.faults import Faults
from reft_serve.datafiles.formats import Glue, Labelled, Rows
from reft_serve.errors import DataInvalid
from reft_serve.interventions.vocabulary import MAX_LABELS, ProblemType
from reft_serve.training.data.encoding import notes_of

__all__ = ["Goals", "LabelledData", "LabelledExample", "encode_labelled", "goals_of"]

_BATCH = 1024
_LISTED = 20
_Label = str | int | float | tuple[str | int | float, ...]


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """A text, or a pair of texts, and its target.

    Args:
        token_types: of each token, if the tokenizer marks the two texts of a pair by them; else
            empty.
        goal: the index of the class; or the indices of the labels; or the numbers of a regression.
    """

    input_ids: tuple[int, ...]
    token_types: tuple[int, ...]
    goal: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Goals:
    """The problem type of a training file, and the name of each output."""

    problem_type: ProblemType
    labels: tuple[str, ...]
    _index: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {name: k for k, name in enumerate(self.labels)})

    def of(self, label: _Label) -> tuple[float, ...]:
        """The target of a row.

        Raises:
            ValueError: the label is not one of these; the message continues "line N".
        """
        if self.problem_type == "regression":
            numbers = label if isinstance(label, tuple) else (label,)
            if len(numbers) != len(self.labels) or not all(
                isinstance(n, int | float) for n in numbers
            ):
                raise ValueError(
                    f"has the label {str(label)[:60]!r}, but this regression needs "
                    f"{len(self.labels)} numbers"
                )
            try:
                return tuple(float(n) for n in numbers)
            except OverflowError:
                raise ValueError("has a number that is too large") from None
        if self.problem_type == "multi_label_classification":
            each = label if isinstance(label, tuple) else (label,)
            return tuple(sorted({self._number(name) for name in each}))
        if isinstance(label, tuple):
            raise ValueError(
                "has a list of labels, but the first row of the training file has one label"
            )
        return (self._number(label),)

    def _number(self, label: str | int | float) -> float:
        name = _name(label)
        if name in self._index:
            return float(self._index[name])
        number = int(name) if name.isdecimal() else -1
        if 0 <= number < len(self.labels):  # names were given for numbered classes
            return float(number)
        raise ValueError(
            f"has the label {name[:60]!r}, which is not one of "
            f"{', '.join(self.labels[:_LISTED])[:400]}"
        )


@dataclass(frozen=True, slots=True)
class LabelledData:
    """The examples of one file; `too_long` and `fingerprint` as in `encoding.TrainingData`."""

    where: str
    examples: tuple[LabelledExample, ...]
    too_long: tuple[int, ...]
    max_tokens: int
    fingerprint: str

    def notes(self) -> list[str]:
        """Notes about skipped examples; empty if there are none."""
        return notes_of(self.where, len(self.examples), self.too_long, self.max_tokens)


def goals_of(
    rows: Rows, task: Literal["classification", "regression"], names: Sequence[str] = ()
) -> Goals:
    """The problem type and labels of a training file.

    Args:
        names: of the outputs, in their order; the default is the file's labels, sorted.

    Raises:
        DataInvalid: the file has no labels, or labels that the task cannot learn.
    """
    labels = [_label(row) for _, row in rows.rows if isinstance(row, Glue | Labelled)]
    if len(labels) < len(rows.rows):
        raise DataInvalid(
            rows.where,
            [
                f'{task} needs rows such as {{"text": ..., "label": ...}}, but these are '
                f"{rows.format} rows"
            ],
        )
    first = labels[0]
    if task == "regression":
        width = len(first) if isinstance(first, tuple) else 1
        default = ("score",) if width == 1 else tuple(f"score {k}" for k in range(width))
        return _checked(rows, Goals("regression", tuple(names) or default), width)
    labels_seen = {
        _name(each)
        for label in labels
        for each in (label if isinstance(label, tuple) else (label,))
    }
    ordered = sorted(
        labels_seen,
        key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name),
    )
    problem: ProblemType = (
        "multi_label_classification" if isinstance(first, tuple) else "single_label_classification"
    )
    if problem == "single_label_classification" and len(ordered) < 2 and not names:
        raise DataInvalid(
            rows.where,
            [f"every row has the label {ordered[0][:60]!r}; a classification needs two classes"],
        )
    if len(ordered) > MAX_LABELS:
        raise DataInvalid(
            rows.where,
            [f"its rows have {len(ordered):,} labels; at most {MAX_LABELS:,} are allowed"],
        )
    return Goals(problem, tuple(names) or tuple(ordered))


def _checked(rows: Rows, goals: Goals, width: int) -> Goals:
    if not width or len(goals.labels) != width:
        raise DataInvalid(
            rows.where, [f"its rows have {width} numbers, but --labels names {len(goals.labels)}"]
        )
    return goals


def encode_labelled(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, goals: Goals, *, max_tokens: int
) -> LabelledData:
    """The examples of a checked file, in its order, tokenised as `/v1/classify` does it.

    Raises:
        DataInvalid: every fault of the file: a label that the training file does not have, or no
            example left.
    """
    faults = Faults()
    kept: list[tuple[int, tuple[str, ...], tuple[float, ...]]] = []
    for line, row in rows.rows:
        if not isinstance(row, Glue | Labelled):
            faults.add(f"is a {rows.format} row, which has no label", line)
            continue
        try:
            kept.append((line, row.texts, goals.of(_label(row))))
        except ValueError as exc:
            faults.add(str(exc), line)
    if faults:
        raise DataInvalid(rows.where, faults.sentences())
    examples, too_long = [], []
    for (line, _, goal), ids, types in _tokens(kept, tokenizer):
        if len(ids) > max_tokens:
            too_long.append(line)
        else:
            examples.append(LabelledExample(ids, types, goal))
    if not examples:
        raise DataInvalid(rows.where, [f"every example is longer than {max_tokens:,} tokens"])
    digest = hashlib.sha256(
        repr((max_tokens, goals, sorted(tokenizer.get_vocab().items()))).encode()
    )
    for each in rows.rows:
        digest.update(repr(each).encode())
    return LabelledData(
        rows.where, tuple(examples), tuple(too_long), max_tokens, digest.hexdigest()
    )


_Kept = tuple[int, tuple[str, ...], tuple[float, ...]]


def _tokens(
    kept: Sequence[_Kept], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[_Kept, tuple[int, ...], tuple[int, ...]]]:
    for start in range(0, len(kept), _BATCH):
        part = kept[start : start + _BATCH]
        encoded: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for count in (1, 2):  # single texts, then pairs: a file may hold both
            at = [k for k, (_, texts, _) in enumerate(part) if len(texts) == count]
            if at:
                columns = [[part[k][1][column] for k in at] for column in range(count)]
                encoded |= zip(at, _encoded(columns, tokenizer), strict=True)
        for k, each in enumerate(part):
            yield each, *encoded[k]


def _encoded(
    columns: Sequence[list[str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    # The caller checks the length; the tokenizer's own warning is not wanted.
    batch = tokenizer(*columns, verbose=False)
    ids = batch["input_ids"]
    types = batch.get("token_type_ids") or [()] * len(ids)
    for tokens, kinds in zip(ids, types, strict=True):
        yield tuple(tokens), tuple(kinds) if any(kinds) else ()


def _label(row: Glue | Labelled) -> _Label:
    return row.label


def _name(label: str | int | float) -> str:
    """Each label's own: a number of many digits is not rounded into another's name."""
    if isinstance(label, float):
        return str(int(label)) if label.is_integer() else repr(label)
    return str(label)
