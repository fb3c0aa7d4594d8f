"""Hyper-parameters of fine-tuning jobs: OpenAI's and ReFT's own, each a value or "auto". No torch.

The gateway checks them as they come, the worker reads them back from the job's row and decides what
"auto" is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from reft_serve.errors import PositionsInvalid
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import ACTIVATION_CODES, KINDS, MAX_LABELS, Kind, Read

__all__ = [
    "HEAD_METHODS",
    "Auto",
    "DpoHyperparameters",
    "EveryHyperparameter",
    "HeadHyperparameters",
    "Hyperparameters",
    "MethodName",
    "SupervisedHyperparameters",
    "read_hyperparameters",
]

Auto = Literal["auto"]
MethodName = Literal["supervised", "dpo", "classification", "regression", "reward"]
HEAD_METHODS = ("classification", "regression", "reward")
"""The methods that train a classifier head."""
if TYPE_CHECKING:
    _Activation = str
else:
    _Activation = Literal[tuple(ACTIVATION_CODES)]
_POSITIONS = (
    r"^(auto|f[1-9]\d{0,3}(\+l[1-9]\d{0,3})?|l[1-9]\d{0,3}|first|last|all"
    r"|-?\d{1,6}(,-?\d{1,6}){0,63})$"
)
_MANY = 2000  # examples, from which "auto" takes twice the rank
_Layer = Annotated[int, Field(ge=0, lt=10_000)]
_Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00]*$")]
_Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,64}$")]


def _or_auto(wanted: str) -> WrapValidator:
    """One error sentence for a field, instead of one for each type in its union."""

    def check(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError as exc:
            raise ValueError(f'it must be "auto" or {wanted}') from exc

    return WrapValidator(check)


_Share = Annotated[float, Field(ge=0, lt=1)]


class Hyperparameters(BaseModel):
    """Those of every method. What is left out is "auto".

    Args:
        batch_size: examples of a step. accumulation: the parts that a batch is worked off in, to
            save memory.
        learning_rate_multiplier: of the rate that "auto" would be. learning_rate: the rate itself,
            instead.
        layers: where the interventions are: "all", or numbers from 0.
        positions: the prompt tokens that are edited, such as f7+l7. tied: first and last ones share
            their weights.
        dropout: on the edited states. activation: of W h + b.
        lora_rank: of a LoRA that is trained as well; 0 for none. lora_alpha, lora_targets: as PEFT
            has them.
        warmup: share of the steps. max_tokens: longer examples are left out and counted.
        save_every: steps between checkpoints and evaluations.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    n_epochs: Annotated[
        Auto | Annotated[int, Field(ge=1, le=100)], _or_auto("a whole number from 1 to 100")
    ] = "auto"
    batch_size: Annotated[
        Auto | Annotated[int, Field(ge=1, le=1024)], _or_auto("a whole number from 1 to 1,024")
    ] = "auto"
    learning_rate_multiplier: Annotated[
        Auto | Annotated[float, Field(gt=0, le=1000)], _or_auto("a number above 0, at most 1,000")
    ] = "auto"
    kind: Annotated[Auto | Kind, _or_auto(f"one of {', '.join(KINDS)}")] = "auto"
    rank: Annotated[
        Auto | Annotated[int, Field(ge=1, le=1024)], _or_auto("a whole number from 1 to 1,024")
    ] = "auto"
    layers: Annotated[
        Auto | Literal["all"] | Annotated[list[_Layer], Field(min_length=1, max_length=1000)],
        _or_auto('"all" or a list of layer numbers from 0'),
    ] = "auto"
    positions: Annotated[
        str,
        Field(pattern=_POSITIONS),
        _or_auto("fN, lN, fN+lN, first, last, all, or indices such as 0,3,-1"),
    ] = "auto"
    tied: Annotated[Auto | bool, _or_auto("true or false")] = "auto"
    activation: Annotated[Auto | _Activation, _or_auto(f"one of {', '.join(ACTIVATION_CODES)}")] = (
        "auto"
    )
    dropout: Annotated[Auto | _Share, _or_auto("a number from 0 to below 1")] = "auto"
    lora_rank: Annotated[
        Auto | Annotated[int, Field(ge=0, le=512)], _or_auto("a whole number from 0 to 512")
    ] = "auto"
    lora_alpha: Annotated[
        Auto | Annotated[float, Field(gt=0, le=10_000)],
        _or_auto("a number above 0, at most 10,000"),
    ] = "auto"
    lora_targets: Annotated[
        Auto | Annotated[list[_Module], Field(min_length=1, max_length=64)],
        _or_auto("a list of names of linear layers, such as q_proj"),
    ] = "auto"
    learning_rate: Annotated[
        Auto | Annotated[float, Field(gt=0, le=1)], _or_auto("a number above 0, at most 1")
    ] = "auto"
    schedule: Annotated[
        Auto | Literal["linear", "cosine", "constant"], _or_auto("one of linear, cosine, constant")
    ] = "auto"
    warmup: Annotated[Auto | _Share, _or_auto("a number from 0 to below 1")] = "auto"
    accumulation: Annotated[
        Auto | Annotated[int, Field(ge=1, le=1024)], _or_auto("a whole number from 1 to 1,024")
    ] = "auto"
    max_tokens: Annotated[
        Auto | Annotated[int, Field(ge=8, le=1_048_576)],
        _or_auto("a whole number from 8 to 1,048,576"),
    ] = "auto"
    save_every: Annotated[
        Auto | Annotated[int, Field(ge=1, le=1_000_000)],
        _or_auto("a whole number from 1 to 1,000,000"),
    ] = "auto"

    @model_validator(mode="after")
    def _agree(self) -> Hyperparameters:
        if self.positions != "auto":
            try:
                PositionRule(self.positions, tied=self.tied != False)  # noqa: E712 - or "auto"
            except PositionsInvalid as exc:
                raise ValueError(str(exc)) from exc
        elif self.tied is False:
            raise ValueError("tied is false, which needs positions of the form fN+lN")
        if self.learning_rate != "auto" and self.learning_rate_multiplier != "auto":
            raise ValueError("set learning_rate or learning_rate_multiplier, not both")
        lora = [name for name in ("lora_alpha", "lora_targets") if getattr(self, name) != "auto"]
        if lora and self.lora_rank in ("auto", 0):
            raise ValueError(f"{lora[0]} belongs to a LoRA: set lora_rank as well")
        return self

    def shape(self, examples: int, hidden_size: int) -> dict[str, Any]:
        """The adapter's shape with every "auto" resolved: kind, rank, layers, positions, tied and
        activation, as JSON.
        """
        chosen = {
            "kind": "loreft",
            "rank": min(8 if examples >= _MANY else 4, hidden_size),
            "layers": "all",
            "positions": "f7+l7",
            "tied": True,
            "activation": "linear",
        }
        return {
            name: value if (asked := getattr(self, name)) == "auto" else asked
            for name, value in chosen.items()
        }

    def epochs(self, examples: int) -> int:
        """Number of epochs, "auto" resolved."""
        return _epochs(examples) if self.n_epochs == "auto" else self.n_epochs

    def asked(self) -> dict[str, Any]:
        """The values that were set, as JSON."""
        return {name: value for name, value in self.model_dump().items() if value != "auto"}


class SupervisedHyperparameters(Hyperparameters):
    """Those of supervised fine-tuning."""


class DpoHyperparameters(Hyperparameters):
    """Those of direct preference optimisation. `beta`: how much keeping near the base model
    counts.
    """

    beta: Annotated[
        Auto | Annotated[float, Field(gt=0, le=100)], _or_auto("a number above 0, at most 100")
    ] = "auto"


class HeadHyperparameters(Hyperparameters):
    """Those of classification, regression and reward, which train a classifier head too.

    Args:
        labels: the names of the head's outputs, in their order; those of the data otherwise.
        head_reads: the token whose last state the head takes, or the mean of all.
        head_activation: after its dense layer; "none" for one linear layer.
    """

    labels: Annotated[
        Auto | Annotated[list[_Name], Field(min_length=1, max_length=MAX_LABELS)],
        _or_auto("a list of names"),
    ] = "auto"
    head_reads: Annotated[Auto | Read, _or_auto("one of first, last, mean")] = "auto"
    head_activation: Annotated[
        Auto | Literal["none"] | _Activation,
        _or_auto(f"none, or one of {', '.join(ACTIVATION_CODES)}"),
    ] = "auto"


class EveryHyperparameter(HeadHyperparameters, DpoHyperparameters):
    """Those of all methods."""


def read_hyperparameters(asked: Mapping[str, Any]) -> EveryHyperparameter:
    """Read the hyper-parameters of a job's row, for any method."""
    return EveryHyperparameter.model_validate(dict(asked))


def _epochs(examples: int) -> int:
    if examples >= 20_000:
        return 1 if examples >= 100_000 else 2
    return max(3, min(12, -(-1000 // max(1, examples))))
