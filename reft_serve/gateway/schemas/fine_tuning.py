"""Request and response schemas of the files and fine-tuning routes, as the `openai` package's types
have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from reft_serve.database import models
from reft_serve.database.jobs.outcomes import FINAL
from reft_serve.database.names import ADAPTER_NAME
from reft_serve.gateway.schemas.fields import NO_NUL, TENANT_ID
from reft_serve.gateway.schemas.request_model import NULLS_ARE_ABSENT, RequestModel
from reft_serve.recipes.hyperparameters import (
    DpoHyperparameters,
    HeadHyperparameters,
    Hyperparameters,
    MethodName,
    SupervisedHyperparameters,
)

__all__ = [
    "FILE_ID",
    "CheckpointOut",
    "EventOut",
    "FileOut",
    "Identified",
    "JobAdminOut",
    "JobIn",
    "JobOut",
    "MethodIn",
    "Page",
    "PermissionOut",
    "PermissionsIn",
]

FILE_ID = r"^file-[A-Za-z0-9]{1,58}$"
_SupervisedHyperparameters = Annotated[SupervisedHyperparameters, *NULLS_ARE_ABSENT]
_DpoHyperparameters = Annotated[DpoHyperparameters, *NULLS_ARE_ABSENT]
_HeadHyperparameters = Annotated[HeadHyperparameters, *NULLS_ARE_ABSENT]
_KNOWN: dict[str, type[Hyperparameters]] = {
    "supervised": SupervisedHyperparameters,
    "dpo": DpoHyperparameters,
}
_FileId = Annotated[str, Field(pattern=FILE_ID)]
_OLD = ("n_epochs", "batch_size", "learning_rate_multiplier")


class Identified(BaseModel):
    """An object with an id."""

    id: str


T = TypeVar("T", bound=Identified)


class Page(BaseModel, Generic[T]):
    """A part of a list; the next one begins after `last_id`."""

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: Sequence[T], has_more: bool) -> Page[T]:
        """A page of these objects."""
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=list(data), first_id=first, last_id=last, has_more=has_more)


class FileOut(Identified):
    """OpenAI's file object; `format` and `rows` are what the check has found."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str
    status_details: str | None = None
    format: str | None
    rows: int | None

    @classmethod
    def of(cls, row: models.File) -> FileOut:
        return cls(
            id=row.id,
            bytes=row.bytes,
            created_at=row.created_ms // 1000,
            filename=row.filename,
            purpose=row.purpose,
            expires_at=_seconds(row.expires_ms),
            status=row.status,
            format=row.format,
            rows=row.rows,
        )


class _Wandb(RequestModel):
    project: Annotated[str, Field(min_length=1, max_length=128, pattern=NO_NUL)]
    name: Annotated[str, Field(max_length=128, pattern=NO_NUL)] | None = None
    entity: Annotated[str, Field(max_length=128, pattern=NO_NUL)] | None = None
    tags: (
        Annotated[list[Annotated[str, Field(max_length=64, pattern=NO_NUL)]], Field(max_length=32)]
        | None
    ) = None


class _Integration(RequestModel):
    type: Literal["wandb"]
    wandb: _Wandb


class _Supervised(RequestModel):
    hyperparameters: _SupervisedHyperparameters = SupervisedHyperparameters()


class _Dpo(RequestModel):
    hyperparameters: _DpoHyperparameters = DpoHyperparameters()


class _Head(RequestModel):
    hyperparameters: _HeadHyperparameters = HeadHyperparameters()


def _known_method(kind: object) -> object:
    if kind not in get_args(MethodName):
        raise ValueError(
            f"it must be one of {', '.join(get_args(MethodName))}; {str(kind)[:40]!r} is not "
            "supported"
        )
    return kind


class MethodIn(RequestModel):
    """How to train. `classification`, `regression` and `reward` train a classifier head too, and
    are ours.
    """

    type: Annotated[MethodName, BeforeValidator(_known_method)]
    supervised: _Supervised | None = None
    dpo: _Dpo | None = None
    classification: _Head | None = None
    regression: _Head | None = None
    reward: _Head | None = None

    @model_validator(mode="after")
    def _agree(self) -> MethodIn:
        for other in get_args(MethodName):
            if other != self.type and getattr(self, other) is not None:
                raise ValueError(f"its type is {self.type}, but it has settings of {other}")
        return self


class JobIn(RequestModel):
    """A fine-tuning job to create. `priority` is an extension: below 0 for a job that can wait."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    training_file: _FileId
    validation_file: _FileId | None = None
    method: MethodIn | None = None
    hyperparameters: _SupervisedHyperparameters | None = None
    suffix: Annotated[str, Field(pattern=ADAPTER_NAME)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64, pattern=NO_NUL)],
                Annotated[str, Field(max_length=512, pattern=NO_NUL)],
            ],
            Field(max_length=16),
            *NULLS_ARE_ABSENT,
        ]
        | None
    ) = None
    integrations: Annotated[list[_Integration], Field(max_length=4)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0


class JobError(BaseModel):
    code: str
    message: str
    param: str | None


class _Method(BaseModel):
    type: MethodName
    supervised: dict[str, Any] | None = None
    dpo: dict[str, Any] | None = None
    classification: dict[str, Any] | None = None
    regression: dict[str, Any] | None = None
    reward: dict[str, Any] | None = None


class _Progress(BaseModel):
    step: int
    steps: int | None


class JobOut(Identified):
    """OpenAI's fine-tuning job. `adapter`, `progress`, `started_at` and `priority` are ours."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    model: str
    created_at: int
    started_at: int | None
    finished_at: int | None
    fine_tuned_model: str | None
    organization_id: str
    status: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    hyperparameters: dict[str, Any]
    method: _Method
    trained_tokens: int | None
    error: JobError | None
    seed: int
    suffix: str | None
    metadata: dict[str, str]
    integrations: list[dict[str, Any]]
    estimated_finish: int | None
    adapter: str
    progress: _Progress
    priority: int

    @classmethod
    def fields_of(cls, row: models.Job) -> dict[str, Any]:
        """Its values, from its row."""
        used = _used(row)
        kind = row.method["type"]
        return {
            "id": row.id,
            "model": row.parent_model or row.model,
            "created_at": row.created_ms // 1000,
            "started_at": _seconds(row.started_ms),
            "finished_at": _seconds(row.finished_ms),
            "fine_tuned_model": row.fine_tuned_model,
            "organization_id": row.tenant_id,
            "status": row.status,
            "training_file": row.training_file_id,
            "validation_file": row.validation_file_id,
            "result_files": [row.result_file_id] if row.result_file_id else [],
            "hyperparameters": {name: used[name] for name in _OLD},
            "method": {"type": kind, kind: {"hyperparameters": used}},
            "trained_tokens": row.trained_tokens if row.status in FINAL else None,
            "error": row.error,
            "seed": row.seed,
            "suffix": row.suffix,
            "metadata": row.metadata_,
            "integrations": row.integrations,
            "estimated_finish": _seconds(row.estimated_finish_ms),
            "adapter": row.adapter,
            "progress": {"step": row.step, "steps": row.steps},
            "priority": row.priority,
        }

    @classmethod
    def of(cls, row: models.Job) -> JobOut:
        return cls(**cls.fields_of(row))


class JobAdminOut(JobOut):
    """A job with the fields for operators only."""

    tenant: str
    wanted: str
    attempts: int
    worker: str | None
    lease_until: int | None
    memory_bytes: int | None
    traceback: str | None

    @classmethod
    def of(cls, row: models.Job) -> JobAdminOut:
        return cls(
            tenant=row.tenant.name,
            wanted=row.wanted,
            attempts=row.attempts,
            worker=row.worker,
            lease_until=_seconds(row.lease_until_ms if row.status == "running" else None),
            memory_bytes=row.memory_bytes,
            traceback=row.traceback,
            **cls.fields_of(row),
        )


class EventOut(Identified):
    """OpenAI's event of a job."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None

    @classmethod
    def of(cls, row: models.Event) -> EventOut:
        return cls(
            id=row.id,
            created_at=row.created_ms // 1000,
            level=row.level,
            message=row.message,
            type=row.type,
            data=row.data,
        )


class CheckpointOut(Identified):
    """OpenAI's checkpoint, which can be called by its name."""

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float]

    @classmethod
    def of(cls, row: models.Checkpoint) -> CheckpointOut:
        """From its row, which has a version."""
        assert row.version is not None
        return cls(
            id=row.id,
            created_at=row.created_ms // 1000,
            fine_tuning_job_id=row.job_id,
            fine_tuned_model_checkpoint=row.version.model_id,
            step_number=row.step,
            metrics={"step": row.step, **row.metrics},
        )


class PermissionsIn(RequestModel):
    """The tenants that may use a version."""

    project_ids: Annotated[
        list[Annotated[str, Field(pattern=TENANT_ID)]], Field(min_length=1, max_length=100)
    ]


class PermissionOut(Identified):
    """Permission of a tenant, `project_id`, to use a version."""

    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    created_at: int
    project_id: str

    @classmethod
    def of(cls, row: models.Permission) -> PermissionOut:
        return cls(id=row.id, created_at=row.created_ms // 1000, project_id=row.tenant_id)


def _used(row: models.Job) -> Mapping[str, Any]:
    """The hyper-parameters: the requested values, with "auto" resolved once known."""
    known: type[Hyperparameters] = _KNOWN.get(row.method["type"], HeadHyperparameters)
    held = row.hyperparameters | row.resolved
    return {name: held.get(name, "auto") for name in known.model_fields}


def _seconds(ms: int | None) -> int | None:
    return None if ms is None else ms // 1000
