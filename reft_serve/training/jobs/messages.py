"""Messages between a worker and the process of a job: JSON lines over a socket. No torch."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from reft_serve.recipes.hyperparameters import MethodName

__all__ = [
    "RUN",
    "STOP",
    "Bounds",
    "Broken",
    "Ended",
    "JobSpec",
    "Measured",
    "Message",
    "Noted",
    "Resolved",
    "Saved",
    "Started",
    "read_message",
]

RUN = "run"
"""The run's directory, in a job's folder."""
STOP = b"stop\n"
"""The line that asks a job to stop after its step."""


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    def line(self) -> bytes:
        """The message as one line."""
        return self.model_dump_json().encode() + b"\n"


class Bounds(_Plain):
    """Bounds of a run; None for no bound. `hours`: of training, over all attempts."""

    examples: int | None = None
    tokens: int | None = None
    hours: float | None = None


class JobSpec(_Plain):
    """One job, as its process gets it.

    Args:
        job: its id.
        folder: where the run lies; a checkpoint that is there already is gone on from.
        base: the base model's directory.
        training, validation: the data files.
        hyperparameters: what was asked. resolved: what an attempt before made of it; empty at the
            first.
        device: "cpu" or a GPU's number. threads: of a job on the CPU.
        started: when the first attempt began, as UTC without a time zone: what chat templates take
            for the present.
        bounds: of the tenant's limits.
        reports: environment variables of reporting integrations, by integration.
        parent: directory of the version to continue from. parent_name: its full name.
    """

    job: str
    folder: str
    base: str
    training: str
    validation: str | None = None
    method: MethodName = "supervised"
    hyperparameters: dict[str, Any] = {}
    resolved: dict[str, Any] = {}
    seed: int = 42
    started: datetime | None = None
    bounds: Bounds = Bounds()
    device: str = "cpu"
    threads: int = 1
    reports: dict[str, dict[str, str]] = {}
    parent: str | None = None
    parent_name: str | None = None


class Noted(_Plain):
    """Something that the job's owner should know."""

    kind: Literal["noted"] = "noted"
    message: str


class Resolved(_Plain):
    """Resolved values of "auto"."""

    kind: Literal["resolved"] = "resolved"
    resolved: dict[str, Any]


class Started(_Plain):
    """The run begins after `step` of `steps`."""

    kind: Literal["started"] = "started"
    step: int
    steps: int


class Measured(_Plain):
    """Numbers of a step or of an evaluation, named as the trainer names them (`loss`, `eval_loss`,
    `tokens` ...).
    """

    kind: Literal["measured"] = "measured"
    step: int
    metrics: dict[str, float]


class Saved(_Plain):
    """A checkpoint of this step lies at `path`, one file with all that another process needs to
    resume from it.
    """

    kind: Literal["saved"] = "saved"
    step: int
    path: str


class Ended(_Plain):
    """The run is over: done, or stopped on its way as was asked."""

    kind: Literal["ended"] = "ended"
    done: bool
    step: int
    tokens: int
    best_step: int | None = None
    peak_memory: int = 0


class Broken(_Plain):
    """The run cannot continue. `cause`: the user (it would fail again), the machine (it would
    continue elsewhere), a lack of memory, or unknown.
    """

    kind: Literal["broken"] = "broken"
    cause: Literal["user", "machine", "memory", "unknown"]
    code: str
    message: str
    param: str | None = None
    traceback: str = ""


Message = Noted | Resolved | Started | Measured | Saved | Ended | Broken
_ANY: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def read_message(line: bytes) -> Message:
    """A message from its line."""
    return _ANY.validate_json(line)
