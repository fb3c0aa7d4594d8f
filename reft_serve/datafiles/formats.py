"""The rows of a data file: its format found, every row checked, every fault in one report. No
torch, no transformers.

==============  ==================================================================================
`chat`          OpenAI's fine-tuning rows: `messages`, with an optional `weight` of 0 or 1 on an
                assistant turn, and `tools`
`completion`    `prompt` and `completion`
`preference`    OpenAI's DPO rows: `input.messages`, `preferred_output`, `non_preferred_output`
`instruction`   Alpaca's and LLM-Adapters' rows: `instruction`, `input`, `output`, `answer`
`glue`          GLUE's rows: one or two sentences and a `label`
`labelled`      `text`, perhaps `text_pair`, and a `label`: a word, a number, or a list of them
==============  ==================================================================================

The first rows decide which of them a file is in; a row of another is a fault. Keys next to those of
the format are ignored in a row (`id`, `task`) and refused in a turn. `conversations` says which
forms of a turn are taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from reft_serve.datafiles.conversations import (
    MAX_TOOLS,
    DataModel,
    FilledText,
    Message,
    Messages,
    Text,
    Tool,
    normal_conversation,
    not_a_bool,
)
from reft_serve.datafiles.faults import Faults, kind_of
from reft_serve.datafiles.lines import FileLimits, read_values
from reft_serve.errors import DataInvalid

__all__ = [
    "Chat",
    "Completion",
    "DataRow",
    "Format",
    "Glue",
    "Instruction",
    "Labelled",
    "Message",
    "PreferencePair",
    "Rows",
    "check_rows",
    "read_rows",
]

Format = Literal["chat", "completion", "preference", "instruction", "glue", "labelled"]
_DECIDING = 8
_GLUE_KEYS = (
    ("sentence",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
)
_SENTENCES = tuple(dict.fromkeys(key for keys in _GLUE_KEYS for key in keys))


_Tools = Annotated[tuple[Tool, ...], Field(strict=False, max_length=MAX_TOOLS)] | None


class Chat(DataModel):
    """A conversation; each assistant turn of weight 1 is learnt from the turns before it."""

    format: ClassVar[Format] = "chat"
    messages: Messages
    tools: _Tools = None

    @model_validator(mode="before")
    @classmethod
    def _normal(cls, row: Any) -> Any:
        return normal_conversation(row, "messages") if isinstance(row, dict) else row

    @field_validator("messages")
    @classmethod
    def _learnable(cls, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        answers = [message for message in messages if message.role == "assistant"]
        if not answers:
            raise ValueError("has no assistant turn, so there is nothing to learn")
        if messages[-1].role != "assistant":
            raise ValueError(
                f"ends with a {messages[-1].role} turn: the last turn must be the assistant's"
            )
        if all(message.weight == 0 for message in answers):
            raise ValueError("has no assistant turn of weight 1, so there is nothing to learn")
        if messages[0].role == "assistant" and messages[0].weight != 0:
            raise ValueError(
                "begins with an assistant turn, which answers nothing: give it weight 0"
            )
        return messages

    @property
    def learnt(self) -> list[int]:
        """The indices of the turns to learn."""
        return [
            i
            for i, turn in enumerate(self.messages)
            if turn.role == "assistant" and turn.weight != 0
        ]


class Completion(DataModel):
    """A text and how it continues."""

    format: ClassVar[Format] = "completion"
    prompt: FilledText
    completion: FilledText


class _Question(DataModel):
    messages: Messages
    tools: _Tools = None

    @model_validator(mode="before")
    @classmethod
    def _normal(cls, question: Any) -> Any:
        return normal_conversation(question, "messages") if isinstance(question, dict) else question

    @field_validator("messages")
    @classmethod
    def _open(cls, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if messages[-1].role == "assistant":
            raise ValueError("ends with an assistant turn: the answers belong in the two outputs")
        return messages


class PreferencePair(DataModel):
    """A conversation and two answers to it, the first of them better."""

    format: ClassVar[Format] = "preference"
    input: _Question
    preferred_output: Messages
    non_preferred_output: Messages

    @model_validator(mode="before")
    @classmethod
    def _normal(cls, row: Any) -> Any:
        outputs = ("preferred_output", "non_preferred_output")
        return normal_conversation(row, *outputs) if isinstance(row, dict) else row

    @field_validator("preferred_output", "non_preferred_output")
    @classmethod
    def _answers(cls, output: tuple[Message, ...]) -> tuple[Message, ...]:
        if len(output) > 1:
            raise ValueError(f"has {len(output)} turns: it must have one")
        if output[0].role != "assistant":
            raise ValueError(f"has a {output[0].role} turn: it must be the assistant's")
        return output

    @model_validator(mode="after")
    def _differ(self) -> PreferencePair:
        better = self.preferred_output[0]
        worse = self.non_preferred_output[0]
        if (better.content, better.tool_calls) == (worse.content, worse.tool_calls):
            raise ValueError(
                "preferred_output and non_preferred_output are equal, so there is nothing to prefer"
            )
        return self


class Instruction(DataModel):
    """A task for the assistant. `output` is the whole answer, `answer` what a checker compares."""

    format: ClassVar[Format] = "instruction"
    instruction: FilledText
    input: Text = ""
    output: Text = ""
    answer: Text = ""
    task: Text | None = None

    @model_validator(mode="after")
    def _answered(self, info: ValidationInfo) -> Instruction:
        needed = not (info.context and info.context["unanswered"])
        if needed and not self.output.strip() and not self.answer.strip():
            raise ValueError(
                'has neither an "output" nor an "answer", so there is nothing to learn'
            )
        return self


class Glue(DataModel):
    """One or two sentences and their class, or their score where `label` is a fraction."""

    format: ClassVar[Format] = "glue"
    label: Annotated[float, BeforeValidator(not_a_bool)]
    sentence: FilledText | None = None
    sentence1: FilledText | None = None
    sentence2: FilledText | None = None
    premise: FilledText | None = None
    hypothesis: FilledText | None = None
    question: FilledText | None = None
    question1: FilledText | None = None
    question2: FilledText | None = None

    @field_validator("label")
    @classmethod
    def _known(cls, label: float) -> float:
        if label < 0:
            raise ValueError(f"is {label:g}, which marks a test row without a label")
        return label

    @model_validator(mode="after")
    def _complete(self) -> Glue:
        present = tuple(name for name in _SENTENCES if getattr(self, name) is not None)
        if not any(set(present) == set(keys) for keys in _GLUE_KEYS):
            raise ValueError(f"has the sentences {', '.join(present)}, which no task of GLUE has")
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """The sentences in GLUE's order."""
        keys = next(keys for keys in reversed(_GLUE_KEYS) if getattr(self, keys[0]) is not None)
        return tuple(getattr(self, key) for key in keys)


_Word = Annotated[FilledText, Field(max_length=256)] | Annotated[int, BeforeValidator(not_a_bool)]


class Labelled(DataModel):
    """A text, or a pair of texts, and what is to be said of it: a class, a number, or a list of
    labels or numbers.
    """

    format: ClassVar[Format] = "labelled"
    text: FilledText
    text_pair: FilledText | None = None
    label: (
        _Word
        | Annotated[float, BeforeValidator(not_a_bool)]
        | Annotated[tuple[_Word | float, ...], Field(strict=False, max_length=4096)]
    )

    @property
    def texts(self) -> tuple[str, ...]:
        """One or two."""
        return (self.text,) if self.text_pair is None else (self.text, self.text_pair)


DataRow = Chat | Completion | PreferencePair | Instruction | Glue | Labelled
_MODELS: dict[Format, type[DataRow]] = {
    kind.format: kind for kind in (Chat, Completion, PreferencePair, Instruction, Glue, Labelled)
}
# Which keys tell a format: the first of these that a row has any of.
_KEYS: tuple[tuple[Format, frozenset[str]], ...] = (
    ("chat", frozenset({"messages"})),
    ("preference", frozenset({"preferred_output", "non_preferred_output"})),
    ("completion", frozenset({"prompt", "completion"})),
    ("instruction", frozenset({"instruction"})),
    ("glue", frozenset(_SENTENCES) - {"question"}),
    ("labelled", frozenset({"text"})),
)
_ALL_KEYS = frozenset().union(*(keys for _, keys in _KEYS))


@dataclass(frozen=True, slots=True)
class Rows:
    """A checked data file: its format, and every row with its line number."""

    where: str
    format: Format
    rows: tuple[tuple[int, DataRow], ...]


def read_rows(path: Path, limits: FileLimits | None = None) -> Rows:
    """Read and check a data file.

    Raises:
        DataInvalid: with every fault of the file.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        faults = Faults()
        rows = tuple(_rows(stream, limits or FileLimits(), faults))
    _report(str(path), faults)
    return Rows(str(path), rows[0][1].format, rows)


def check_rows(
    stream: BinaryIO, where: str, limits: FileLimits | None = None
) -> tuple[Format, int]:
    """Check a data file as it comes, without holding it: its format and how many rows it has.

    Args:
        where: the file's name, for the message.

    Raises:
        DataInvalid: with every fault of the file.
    """
    faults = Faults()
    count = 0
    format_: Format = "chat"
    for _, row in _rows(stream, limits or FileLimits(), faults):
        count = count + 1
        format_ = row.format
    _report(where, faults)
    return format_, count


def _report(where: str, faults: Faults) -> None:
    if faults:
        raise DataInvalid(where, faults.sentences())


def _rows(stream: BinaryIO, limits: FileLimits, faults: Faults) -> Iterator[tuple[int, DataRow]]:
    """The valid rows. Faults of the others go to `faults`, also if there are too few rows."""
    values = _objects(stream, limits, faults)
    first = list(islice(values, _DECIDING))
    formats = [format_ for _, value in first if (format_ := _format(value))]
    chosen = Counter(formats).most_common(1)[0][0] if formats else None
    seen = 0
    for line, value in chain(first, values):
        seen += 1
        if seen > limits.max_rows:
            faults.add(f"the file has more than {limits.max_rows:,} rows, which is the limit")
            return
        format_ = _format(value)
        if format_ is None:
            faults.add(f"has an unknown format: {_keys(value)}", line)
        elif format_ != chosen:
            faults.add(f"is a {format_} row in a file of {chosen} rows", line)
        else:
            try:
                # null means not given
                present = {key: held for key, held in value.items() if held is not None}
                yield (
                    line,
                    _MODELS[format_].model_validate(
                        present, context={"unanswered": limits.unanswered}
                    ),
                )
            except ValidationError as exc:
                faults.add_errors(exc, line)
    if seen < limits.min_rows and (seen or not faults):
        enough = f": at least {limits.min_rows} are needed" if limits.min_rows > 1 else ""
        faults.add(f"the file has {seen or 'no'} rows{enough}")


def _objects(
    stream: BinaryIO, limits: FileLimits, faults: Faults
) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, value in read_values(stream, limits, faults):
        if isinstance(value, dict):
            yield line, value
        else:
            faults.add(f"is {kind_of(value)}, not an object", line)


def _format(value: dict[str, Any]) -> Format | None:
    present = {key for key in _ALL_KEYS & value.keys() if value[key] is not None}
    return next((format_ for format_, keys in _KEYS if not keys.isdisjoint(present)), None)


def _keys(value: dict[str, Any]) -> str:
    if not value:
        return "it has no keys"
    shown = ", ".join(repr(key[:40]) for key in islice(value, 8))
    return f"its keys are {shown}{', ...' if len(value) > 8 else ''}"
