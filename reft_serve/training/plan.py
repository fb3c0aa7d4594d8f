"""Plan of a run: the values that a recipe, a command line or a fine-tuning job decides. No
torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from reft_serve.errors import ClientError
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import ACTIVATION_CODES, KINDS, Kind, ProblemType, Read
from reft_serve.recipes.recipe import Recipe

__all__ = [
    "AdapterPlan",
    "DType",
    "HeadPlan",
    "LoraPlan",
    "Method",
    "Plan",
    "Schedule",
    "much_is_below",
    "parse_layers",
    "plan_from_recipe",
]

DType = Literal["float32", "bfloat16", "float16"]
Method = Literal["supervised", "dpo", "labels", "reward"]
Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The interventions: one per layer at its output, or two where the position rule is untied.

    Args:
        layers: numbers, or None for every layer.
        dropout: on the whole edited state, as in pyreft.
    """

    kind: Kind = "loreft"
    rank: int = 4
    layers: tuple[int, ...] | None = None
    rule: PositionRule = field(default_factory=lambda: PositionRule("f7+l7"))
    activation: str = "linear"
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """A LoRA trained next to the interventions. `targets`: names of linear modules, or None for
    PEFT's choice.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """A classifier head trained beside the interventions; the values of an adapter's `head`."""

    problem_type: ProblemType
    labels: tuple[str, ...]
    reads: Read = "first"
    activation: str | None = "tanh"


@dataclass(frozen=True, slots=True)
class Plan:
    """One training run. The default of a field that a later version adds keeps the earlier
    behaviour, except rounding, so that runs of earlier versions can be resumed.

    Args:
        batch: examples of a micro-batch. accumulate: micro-batches of an optimiser step.
        max_steps: stop after this many optimiser steps, regardless of `epochs`.
        warmup: share of all steps during which the learning rate rises.
        clip: largest norm of the gradient; 0 for none.
        dtype: of the frozen base; interventions are float32.
        keep_states: GiB of main memory for the states below the lowest edited layer.
            Each epoch would compute it again; they are kept if all of them fit. 0 for none.
        compile: the base's layers, by torch.compile; a run then starts later and is faster.
        shuffle: False takes the examples in their order, each epoch alike.
        save_every: optimiser steps between checkpoints, validation among them; None for once per
            epoch.
        keep: checkpoints to keep, the newest and the best; None for all.
        report_to: reporting integrations of transformers, such as tensorboard or wandb.
    """

    adapter: AdapterPlan = field(default_factory=AdapterPlan)
    lora: LoraPlan | None = None
    head: HeadPlan | None = None
    method: Method = "supervised"
    dpo_beta: float = 0.1
    epochs: float = 3.0
    max_steps: int | None = None
    batch: int = 16
    accumulate: int = 1
    learning_rate: float = 9e-4
    schedule: Schedule = "linear"
    warmup: float = 0.1
    clip: float = 1.0
    dtype: DType = "float32"
    gradient_checkpointing: bool = False
    keep_states: float = 1.0
    compile: bool = False
    seed: int = 42
    shuffle: bool = True
    save_every: int | None = None
    keep: int | None = 3
    report_to: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ClientError that names every value out of its range."""
        faults = list(self._faults())
        if faults:
            raise ClientError("the run cannot start: " + "; ".join(faults))

    def facts(self) -> dict[str, str | int | float | bool | None]:
        """The plan as flat scalars, for a manifest's provenance and a run's summary."""
        facts = asdict(self)
        if self.head is None:
            del facts["head"]  # as plans were recorded before there were heads
        return dict(_flat(facts))

    def _faults(self) -> Iterator[str]:
        if self.adapter.kind not in KINDS:
            yield f"kind {self.adapter.kind!r} is not one of {', '.join(KINDS)}"
        choices = (
            ("dtype", self.dtype, DType),
            ("schedule", self.schedule, Schedule),
            ("method", self.method, Method),
        )
        for name, value, known in choices:
            if value not in get_args(known):
                yield f"{name} {value!r} is not one of {', '.join(get_args(known))}"
        if (self.head is None) != (self.method not in ("labels", "reward")):
            yield (
                f"method {self.method} {'needs' if self.head is None else 'has no use for'} a "
                "classifier head"
            )
        if self.head is not None and (
            self.lora is not None or self.gradient_checkpointing or self.compile
        ):
            yield (
                "a classifier head is trained without a LoRA, gradient checkpointing and compiling"
            )
        if self.adapter.activation not in ACTIVATION_CODES:
            yield (
                f"activation {self.adapter.activation!r} is not one of "
                f"{', '.join(ACTIVATION_CODES)}"
            )
        positive = {
            "rank": self.adapter.rank,
            "batch": self.batch,
            "accumulate": self.accumulate,
            "epochs": self.epochs,
            "learning rate": self.learning_rate,
            "DPO beta": self.dpo_beta,
        } | ({"LoRA rank": self.lora.rank} if self.lora else {})
        positive |= {
            name: value
            for name, value in (
                ("max steps", self.max_steps),
                ("save every", self.save_every),
                ("keep", self.keep),
            )
            if value is not None
        }
        yield from (
            f"{name} must be above 0, not {value}"
            for name, value in positive.items()
            if not value > 0
        )
        for name, share in (("warm-up", self.warmup), ("dropout", self.adapter.dropout)):
            if not 0 <= share < 1:
                yield f"{name} must be a number from 0 to below 1, not {share}"
        for name, amount in (("clip", self.clip), ("keep states", self.keep_states)):
            if not amount >= 0:
                yield f"{name} must not be negative, not {amount}"


def _flat(
    values: dict[str, object], prefix: str = ""
) -> Iterator[tuple[str, str | int | float | bool | None]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield prefix + name, ",".join(str(part) for part in value)
        elif value is None or isinstance(value, str | int | float):
            yield prefix + name, value


def plan_from_recipe(recipe: Recipe) -> Plan:
    """A recipe's plan. Its weight decay is left out: in pyreft, whose settings they are, it reaches
    no intervention.

    Raises:
        ClientError: the recipe edits something other than a layer's output.
    """
    adapter = recipe.adapter
    training = recipe.training
    if adapter.component != "block_output":
        raise ClientError(
            f"{adapter.component} is served but not trained here yet; block_output is"
        )
    return Plan(
        adapter=AdapterPlan(
            kind=adapter.kind,
            rank=adapter.rank,
            layers=None if adapter.layers == "all" else adapter.layers,
            rule=adapter.rule,
            activation=adapter.activation,
            dropout=adapter.dropout,
        ),
        epochs=training.epochs,
        batch=training.batch_size,
        accumulate=training.accumulation,
        learning_rate=training.learning_rate,
        schedule=training.schedule,
        warmup=training.warmup_ratio,
        clip=training.max_grad_norm,
        seed=training.seed,
    )


def much_is_below(lowest: int, layers: int) -> bool:
    """True if at least a quarter of the layers lie below `lowest`, the lowest edited one, and give
    the same in each epoch. Less is not worth the memory.
    """
    return 4 * (lowest + 1) >= layers


def parse_layers(text: str, layers: int) -> tuple[int, ...] | None:
    """`all`, or numbers and ranges such as `3,9,18` or `0-5` or `3;9` (pyreft's spelling); negative
    ones from the end.

    Raises:
        ClientError: it is none of those, or names a layer that a model of `layers` layers has not.
    """
    if text.strip() == "all":
        return None
    chosen: list[int] = []
    for part in text.replace(";", ",").split(","):
        first, dash, last = (
            part.strip().partition("-")
            if not part.strip().startswith("-")
            else (part.strip(), "", "")
        )
        try:
            start = int(first)
            chosen += (
                range(start, int(last) + 1) if dash else [start if start >= 0 else layers + start]
            )
        except ValueError as exc:
            raise ClientError(
                f"layers {text[:64]!r} are not understood: write all, or numbers such as 3,9 or 0-5"
            ) from exc
    wrong = [layer for layer in chosen if not 0 <= layer < layers]
    if wrong or not chosen:
        raise ClientError(
            f"layers {text[:64]!r} name layer {wrong[:1]} and the base model has 0 to {layers - 1}"
        )
    return tuple(sorted(set(chosen)))
