"""The classifier head of an adapter: the optional `head` of `reft_config.json`, and the shapes of
its tensors. No torch.

A head reads the last hidden state of one token of the text, or the mean of all:
`out(act(dense(h)))`, or `out(h)` alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from reft_serve.adapters.header import Entry
from reft_serve.interventions.vocabulary import ACTIVATION_CODES, MAX_LABELS, ProblemType, Read

__all__ = ["HEAD_PREFIX", "HeadSpec", "head_faults", "head_shapes"]

HEAD_PREFIX = "head."

_Label = Annotated[str, Field(min_length=1, max_length=256)]


class HeadSpec(BaseModel):
    """The form of a head.

    Args:
        problem_type: transformers' name for how logits become scores: a softmax, a sigmoid of each,
            or the logits themselves.
        labels: the name of each output.
        reads: the token whose last hidden state is the input, or the mean over all tokens.
        activation: of the dense layer; None for a head without a dense layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    problem_type: ProblemType
    labels: Annotated[tuple[_Label, ...], Field(min_length=1, max_length=MAX_LABELS, strict=False)]
    reads: Read
    activation: str | None = None

    @field_validator("activation")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in ACTIVATION_CODES:
            raise ValueError(
                f"activation {name[:64]!r} is not one of {', '.join(ACTIVATION_CODES)}"
            )
        return name

    @model_validator(mode="after")
    def _distinct(self) -> HeadSpec:
        if len(set(self.labels)) < len(self.labels):
            ((twice, _),) = Counter(self.labels).most_common(1)
            raise ValueError(f"the label {twice[:64]!r} appears twice")
        if self.problem_type == "single_label_classification" and len(self.labels) < 2:
            raise ValueError(
                "a single-label classification needs at least two labels; with one output, use "
                "regression"
            )
        return self

    @property
    def task(self) -> Literal["classification", "regression"]:
        """The task's name on the command line."""
        return "regression" if self.problem_type == "regression" else "classification"


def head_shapes(
    spec: HeadSpec, width: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes of a head's required and of its optional tensors, by their names in the file."""
    outputs = len(spec.labels)
    required: dict[str, tuple[int, ...]] = {f"{HEAD_PREFIX}out.weight": (outputs, width)}
    optional: dict[str, tuple[int, ...]] = {f"{HEAD_PREFIX}out.bias": (outputs,)}
    if spec.activation is not None:
        required |= {
            f"{HEAD_PREFIX}dense.weight": (width, width),
            f"{HEAD_PREFIX}dense.bias": (width,),
        }
    return required, optional


def head_faults(
    spec: HeadSpec | None, width: int, entries: Mapping[str, Entry]
) -> Iterator[tuple[str, str]]:
    """The faults of a head's tensors: (the tensor's name, what is wrong with it)."""
    held = {name: entry for name, entry in entries.items() if name.startswith(HEAD_PREFIX)}
    if spec is None:
        for name in sorted(held):
            yield (
                name,
                f"tensor {name[:80]!r} belongs to a classifier head, but reft_config.json has none",
            )
        return
    required, optional = head_shapes(spec, width)
    for name in required:
        if name not in held:
            yield (
                name,
                f"tensor {name} is missing; a head with {len(spec.labels)} labels needs it",
            )
    shapes = required | optional
    for name, entry in sorted(held.items()):
        if name not in shapes:
            yield name, f"tensor {name[:80]!r} does not belong to this head"
        elif entry.shape != shapes[name]:
            yield (
                name,
                f"{name} has shape {entry.shape} and must have {shapes[name]}, for "
                f"{len(spec.labels)} labels and the hidden size {width}",
            )
        elif entry.dtype != "float32":
            yield name, f"{name} is {entry.dtype} and must be float32"
