"""Recipes: the hyper-parameters of a training run and the task that it is for. TOML in, no torch.

The named ones are the settings of the ReFT paper's four experiments (arXiv 2404.03592, section 4
and its appendix of hyper-parameters), as the commands that reproduce them state: pyreft,
`examples/loreft/README.md`, with the prompts, triggers and decoding of its `templates.py`,
`task_config.py` and `compute_metrics.py` and the defaults of its `train.py`. Greedy decoding
throughout.

===============  ==================================================================================
`commonsense`    LoReFT, rank 8, all layers, f7+l7 tied, 6 epochs of batches of 16 x 2, rate 9e-4,
                 warm-up 0.1
`math`           the same with 12 epochs
`instruct`       LoReFT, rank 4, layers 3, 9, 18, 24, f5+l5 untied, 9 epochs of batches of 4 x 32,
                 rate 9e-4
`glue-TASK`      LoReFT, rank 1, all layers, 3 epochs of batches of 32, rate 6e-4, warm-up 0.09,
                 dropout 0.05; l1 instead of RoBERTa's first token, and a word for an answer
                 instead of a classification head
===============  ==================================================================================
"""

from __future__ import annotations

import string
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reft_serve.datafiles.formats import Completion, DataRow, Glue, Instruction
from reft_serve.errors import ClientError, PositionsInvalid
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import ACTIVATION_CODES, Component, Kind

__all__ = [
    "AdapterSettings",
    "Metric",
    "Recipe",
    "Task",
    "TrainingSettings",
    "load_recipe",
    "recipe_names",
]

Metric = Literal["exact", "number", "label", "matthews", "pearson", "none"]
_FOLDER = Path(__file__).parent
_FIELDS = frozenset(Instruction.model_fields) | frozenset(Glue.model_fields)
_Count = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0, lt=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class AdapterSettings(_Settings):
    """The adapter that is trained. Positions as `PositionRule` spells them; `tied` is pyreft's
    `share_weights`.
    """

    kind: Kind = "loreft"
    rank: _Count = 8
    layers: (
        Literal["all"]
        | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]
    ) = "all"
    component: Component = "block_output"
    positions: str = "f7+l7"
    tied: bool = True
    last_offset: int = 0
    phase: Literal["prompt", "all", "generated"] = "prompt"
    activation: str = "linear"
    dropout: _Share = 0.0

    @model_validator(mode="after")
    def _sound(self) -> AdapterSettings:
        try:
            _ = self.rule
        except PositionsInvalid as exc:
            raise ValueError(str(exc)) from exc
        if self.activation not in ACTIVATION_CODES:
            raise ValueError(
                f"activation {self.activation[:64]!r} is not one of {', '.join(ACTIVATION_CODES)}"
            )
        return self

    @property
    def rule(self) -> PositionRule:
        return PositionRule(self.positions, self.tied, self.last_offset, self.phase)


class TrainingSettings(_Settings):
    """The run. A step takes `batch_size * accumulation` examples; `max_tokens` bounds an example,
    prompt and answer.
    """

    epochs: _Count = 3
    batch_size: _Count = 16
    accumulation: _Count = 1
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 9e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: _Share = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_tokens: _Count = 512
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class Task(_Settings):
    """Conversion of rows to prompts and answers, and the scoring of an answer.

    Args:
        prompt: with the row's fields in braces.
        prompt_with_input: the prompt of a row whose `input` is not empty; the same one unless
            given.
        answer: what is learnt after the prompt; `{label}` is the name of a row's class if there are
            `labels`.
        metric: see `scoring`.
        trigger: what comes before the answer proper in a completion; a completion without it
            answers nothing.
        max_new_tokens, repetition_penalty: of greedy decoding in an evaluation.
    """

    prompt: str
    prompt_with_input: str | None = None
    answer: str
    labels: Annotated[tuple[str, ...], Field(strict=False)] = ()
    metric: Metric = "exact"
    trigger: str = ""
    max_new_tokens: _Count = 32
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _readable(self) -> Task:
        for template in (self.prompt, self.prompt_with_input or "", self.answer):
            unknown = set(_fields(template)) - _FIELDS
            if unknown:
                raise ValueError(
                    f"{template[:40]!r} names {sorted(unknown)[0]!r}, which no row has"
                )
        return self

    def question(self, row: DataRow) -> str:
        """The prompt of a row, which for a completion row is its own. Raises ValueError where the
        row lacks what is named.
        """
        if isinstance(row, Completion):
            return row.prompt
        with_input = (
            self.prompt_with_input is not None
            and isinstance(row, Instruction)
            and row.input.strip()
        )
        return self._filled(
            self.prompt_with_input if with_input and self.prompt_with_input else self.prompt, row
        )

    def reply(self, row: DataRow) -> str:
        """The completion of a row. Raises ValueError as `question` does."""
        if isinstance(row, Completion):
            return row.completion
        return self._filled(self.answer, row)

    def reference(self, row: DataRow) -> str:
        """The reference of a row: its `answer` if it has one, else the reply; empty without a
        metric.
        """
        if self.metric == "none":
            return ""
        return row.answer if isinstance(row, Instruction) and row.answer else self.reply(row)

    def _filled(self, template: str, row: DataRow) -> str:
        values: dict[str, object] = {}
        for name in _fields(template):
            value = getattr(row, name, None)
            if value is None or value == "":
                raise ValueError(f'has no "{name}", which the recipe needs')
            values[name] = self._class(value) if name == "label" and self.labels else value
        return template.format_map(values)

    def _class(self, label: float) -> str:
        if label not in range(len(self.labels)):
            raise ValueError(
                f"label is {label:g}, but the recipe has the classes 0 to {len(self.labels) - 1}"
            )
        return self.labels[int(label)]


class Recipe(_Settings):
    """A whole recipe. `tasks` are alternatives, one of which becomes `task` if it is named:
    `glue-cola`.
    """

    description: str = ""
    source: str = ""
    adapter: AdapterSettings = AdapterSettings()
    training: TrainingSettings = TrainingSettings()
    task: Task | None = None
    tasks: dict[str, Task] = {}


def recipe_names() -> list[str]:
    """The recipes that come with the product."""
    names = []
    for path in sorted(_FOLDER.glob("*.toml")):
        tasks = _read(path).tasks
        names += [f"{path.stem}-{task}" for task in tasks] if tasks else [path.stem]
    return names


def load_recipe(name: str) -> Recipe:
    """A recipe by its name, or by the path of a TOML file. Its `task` is chosen if it has several.

    Raises:
        ClientError: there is none of that name, or the file is not a recipe; every fault of it is
            listed.
    """
    if name.endswith(".toml") or "/" in name:
        return _read(Path(name))
    stem, _, task = name.partition("-")
    path = _FOLDER / f"{stem}.toml"
    if stem.isalnum() and path.is_file():
        recipe = _read(path)
        if not task and not recipe.tasks:
            return recipe
        if task in recipe.tasks:
            return recipe.model_copy(update={"task": recipe.tasks[task], "tasks": {}})
    raise ClientError(
        f"there is no recipe {name[:64]!r}: it is one of {', '.join(recipe_names())}, or a path "
        "ending in .toml"
    )


def _read(path: Path) -> Recipe:
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ClientError(f"recipe {path} is not TOML: {exc}") from exc
    except ValidationError as exc:
        faults = [
            f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}"
            for e in exc.errors(include_url=False)
        ]
        raise ClientError(f"recipe {path} cannot be used: {'; '.join(faults)}") from exc


def _fields(template: str) -> list[str]:
    """The fields in a template. Raises ValueError if it is not a template, or reaches into a
    field.
    """
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"{{{name}}} is not the plain name of a field")
    return names
