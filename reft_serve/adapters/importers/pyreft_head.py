"""The classifier head in a save of pyreft: `pytorch_model.bin`, with the names of transformers'
sequence classifiers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from reft_serve.adapters.head import HeadSpec
from reft_serve.interventions.heads import Head
from reft_serve.interventions.vocabulary import ACTIVATION_CODES, Read

__all__ = ["is_head_parameter", "read_head"]

_PEFT = "base_model.model."
# Each form: (the tensors by our names, what it reads, the activation after its dense layer).
_FORMS: tuple[tuple[dict[str, str], Read, str | None], ...] = (
    ({"out.weight": "score.weight", "out.bias": "score.bias"}, "last", None),
    (
        {
            "dense.weight": "classifier.dense.weight",
            "dense.bias": "classifier.dense.bias",
            "out.weight": "classifier.out_proj.weight",
            "out.bias": "classifier.out_proj.bias",
        },
        "first",
        "tanh",
    ),
    (
        {
            "dense.weight": "pre_classifier.weight",
            "dense.bias": "pre_classifier.bias",
            "out.weight": "classifier.weight",
            "out.bias": "classifier.bias",
        },
        "first",
        "relu",
    ),
    (
        {
            "dense.weight": "bert.pooler.dense.weight",
            "dense.bias": "bert.pooler.dense.bias",
            "out.weight": "classifier.weight",
            "out.bias": "classifier.bias",
        },
        "first",
        "tanh",
    ),
)
_NAMES = frozenset(name for form, _, _ in _FORMS for name in form.values())


def is_head_parameter(name: str) -> bool:
    """True if a parameter of the base model belongs to a classifier head."""
    return name.removeprefix(_PEFT) in _NAMES


def read_head(
    parameters: Mapping[str, Tensor],
    labels: Sequence[str],
    problem_type: str | None,
    faults: list[str],
) -> tuple[HeadSpec, Head] | None:
    """A head from the parameters of a save; its faults are added to `faults`.

    Args:
        labels: the names of its outputs; if empty, transformers' LABEL_0, LABEL_1, ...
        problem_type: if None, regression for one output, else a single-label classification.
    """
    held = {
        name.removeprefix(_PEFT): t for name, t in parameters.items() if is_head_parameter(name)
    }
    if not held:
        if labels or problem_type:
            faults.append(
                "--labels and --problem-type describe a classifier head, but the save has none"
            )
        return None
    form = next((form for form in _FORMS if _fits(form[0], held)), None)
    if form is None:
        part = ", ".join(sorted(held))[:200]
        faults.append(
            f"its classifier head is incomplete ({part}): a frozen pooler is not saved; train the "
            "pooler too, or train the head with reft-serve"
        )
        return None
    names, reads, activation = form
    tensors = {
        ours: held[theirs].float().contiguous() for ours, theirs in names.items() if theirs in held
    }
    out = tensors["out.weight"]
    if out.ndim != 2 or not len(out):
        faults.append(
            f"its classifier head has the shape {tuple(out.shape)}, not labels by hidden size"
        )
        return None
    if labels and len(labels) != len(out):
        faults.append(f"--labels names {len(labels)}, but the head has {len(out)} outputs")
        return None
    problem: Any = problem_type or (
        "regression" if len(out) == 1 else "single_label_classification"
    )
    named = tuple(labels) or tuple(f"LABEL_{k}" for k in range(len(out)))
    try:
        spec = HeadSpec(problem_type=problem, labels=named, reads=reads, activation=activation)
    except ValueError as exc:
        faults.append(f"its classifier head: {str(exc)[:300]}")
        return None
    return spec, Head.of(tensors, ACTIVATION_CODES[activation or "linear"])


def _fits(form: Mapping[str, str], held: Mapping[str, Tensor]) -> bool:
    needed = {theirs for ours, theirs in form.items() if ours != "out.bias"}
    return needed <= held.keys() <= set(form.values())
