"""Submission of a fine-tuning job: everything that can be known now is checked now."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.adapters.inheritance import Structure, structure_of
from reft_serve.database import audit, files
from reft_serve.database.jobs import fine_tuning
from reft_serve.database.keys import Principal
from reft_serve.database.models import File, Job
from reft_serve.database.resolution import find_named_version
from reft_serve.database.room import check_adapters_of_jobs, check_room
from reft_serve.database.tenants import find_tenant
from reft_serve.errors import (
    AdapterUnsupported,
    ModelNotFound,
    NotAllowed,
    NotFound,
    RateLimited,
    RequestInvalid,
)
from reft_serve.gateway.jobs.feasibility import why_infeasible
from reft_serve.gateway.schemas.fine_tuning import JobIn
from reft_serve.gateway.services import Services
from reft_serve.recipes.hyperparameters import (
    HEAD_METHODS,
    Hyperparameters,
    MethodName,
    read_hyperparameters,
)

__all__ = ["BYTES_PER_TOKEN", "submit"]

BYTES_PER_TOKEN = 16
"""Bytes per row of a data file: more than in practice, so that a job's token estimate is low."""
_FORMATS: dict[MethodName, tuple[str, ...]] = {
    "supervised": ("chat", "completion", "instruction"),
    "dpo": ("preference",),
    "classification": ("labelled", "glue"),
    "regression": ("labelled", "glue"),
    "reward": ("preference",),
}


async def submit(services: Services, caller: Principal, actor: audit.Actor, wanted: JobIn) -> Job:
    """Put a job into the queue.

    Raises:
        ModelNotFound, NotFound: the model or a file is not there, or not the caller's.
        RequestInvalid: the parts of the request do not fit together, or an engine would refuse what
            the job makes.
        RateLimited: the tenant has as many jobs or adapters as it may.
        NotAllowed: a priority that only an admin gives.
    """
    if wanted.priority > 0 and "admin" not in caller.scopes:
        raise NotAllowed(
            "only an admin can set a priority above 0, which delays other tenants' jobs"
        )
    parent = await _parent(services, caller, wanted.model)
    where = _where(wanted)
    async with services.database.writing() as session:
        training = await _file(session, caller, wanted.training_file, "training_file")
        held_out = None
        if wanted.validation_file is not None:
            held_out = await _file(session, caller, wanted.validation_file, "validation_file")
        method, chosen = _method(wanted, training)
        if parent is not None:
            if method in HEAD_METHODS:
                raise RequestInvalid(
                    f"a job with method {method} starts from the base model, not from a version",
                    "model",
                )
            chosen = _continued(parent, chosen, where)
        _check_formats(method, training, held_out)
        _check_engines(services, wanted, chosen, training)
        _check_size(services, caller, wanted, chosen, training)
        # So that of two jobs at once the second one sees the first.
        await services.database.lock(session, f"jobs:{caller.tenant_id}")
        await _check_room(services, caller, session, wanted.suffix)
        new = fine_tuning.NewJob(
            services.settings.base_model,
            training.id,
            held_out.id if held_out else None,
            {"type": method},
            chosen,
            secrets.randbelow(1 << 31) if wanted.seed is None else wanted.seed,
            wanted.suffix,
            wanted.metadata or {},
            [each.model_dump(exclude_none=True) for each in wanted.integrations or ()],
            wanted.priority,
            parent.model if parent else None,
            parent.digest if parent else None,
        )
        job = await fine_tuning.create_job(
            session, await find_tenant(session, caller.tenant_id), caller.key_id, new
        )
        audit.record(
            session,
            actor,
            "job.create",
            job.id,
            caller.tenant_id,
            training_file=training.id,
            adapter=job.adapter,
        )
        return job


@dataclass(frozen=True, slots=True)
class _Parent:
    """The version to continue from: its full name, its digest, its structure."""

    model: str
    digest: str
    structure: Structure


async def _parent(services: Services, caller: Principal, model: str) -> _Parent | None:
    """The version that `model` names, in any of the spellings of a request; None for the base
    model. A bare name means its production version, else its latest.

    Raises:
        ModelNotFound: there is none.
        RequestInvalid: it is another tenant's, or no job could have made it.
    """
    if model == services.settings.base_model:
        return None
    async with services.database.reading() as session:
        version = await find_named_version(session, caller.tenant_id, model)
    if version is None:
        raise ModelNotFound.named(model)
    if version.adapter.tenant_id != caller.tenant_id:
        raise RequestInvalid(
            "the model is another tenant's: it can be used, and only its owner can train it",
            "model",
        )
    try:
        structure = await asyncio.to_thread(
            structure_of, services.store.path(version.digest), version.model_id
        )
    except AdapterUnsupported as exc:
        raise RequestInvalid(str(exc), "model") from exc
    return _Parent(version.model_id, version.digest, structure)


def _continued(parent: _Parent, chosen: dict[str, Any], where: str) -> dict[str, Any]:
    """The hyper-parameters with the parent's structure.

    Raises:
        RequestInvalid: they would change it, or no hyper-parameters describe it.
    """
    changes = parent.structure.changes(chosen)
    if changes:
        raise RequestInvalid("; ".join(changes.values()), f"{where}.{next(iter(changes))}")
    merged = chosen | parent.structure.hyperparameters()
    try:
        read_hyperparameters(merged)
    except ValidationError as exc:
        raise RequestInvalid(
            f"no job can continue from {parent.model}: {exc.errors()[0]['msg']}", "model"
        ) from exc
    return merged


def _where(wanted: JobIn) -> str:
    """The field of the request that holds the hyper-parameters."""
    method = wanted.method
    return "hyperparameters" if method is None else f"method.{method.type}.hyperparameters"


async def _file(session: AsyncSession, caller: Principal, file_id: str, param: str) -> File:
    try:
        file = await files.find_file(session, caller.tenant_id, file_id, keep=True)
    except NotFound as exc:
        raise NotFound(str(exc), param) from exc
    if file.purpose != "fine-tune":
        raise RequestInvalid(f"file {file.id} is the result of a job, not training data", param)
    return file


def _method(wanted: JobIn, training: File) -> tuple[MethodName, dict[str, Any]]:
    """How to train, and the hyper-parameters that were set; if no method is given, the data's
    own.
    """
    if wanted.method is None:
        own: dict[str | None, MethodName] = {"preference": "dpo", "labelled": "classification"}
        method = own.get(training.format, "supervised")
        settings: Hyperparameters | None = wanted.hyperparameters
        return method, settings.asked() if settings else {}
    if wanted.hyperparameters is not None and wanted.hyperparameters.asked():
        raise RequestInvalid(
            "set hyper-parameters in method or at the top level, not in both", "hyperparameters"
        )
    method = wanted.method.type
    part = getattr(wanted.method, method)
    return method, part.hyperparameters.asked() if part else {}


def _check_formats(method: MethodName, training: File, held_out: File | None) -> None:
    for param, file in (("training_file", training), ("validation_file", held_out)):
        if file is not None and file.format not in _FORMATS[method]:
            fitting = " or ".join(_FORMATS[method])
            raise RequestInvalid(
                f"file {file.id} has {file.format} rows, but method {method} learns from "
                f"{fitting} rows",
                param,
            )


def _check_engines(
    services: Services, wanted: JobIn, chosen: dict[str, Any], training: File
) -> None:
    """Engines that were seen at least once say what they take; it is true of them while they are
    down, too.
    """
    where = _where(wanted)
    for card in (engine.card for engine in services.fleet.engines if engine.card is not None):
        infeasible = why_infeasible(read_hyperparameters(chosen), training.rows or 0, card)
        if infeasible is not None:
            raise RequestInvalid(infeasible.sentence, f"{where}.{infeasible.name}")


def _check_size(
    services: Services, caller: Principal, wanted: JobIn, chosen: dict[str, Any], training: File
) -> None:
    """Refuse a job that is surely larger than the tenant's limits; the worker counts exactly before
    it trains.
    """
    limits = services.quotas.limits(caller)
    rows = training.rows or 0
    epochs = read_hyperparameters(chosen).epochs(rows)
    for name, estimate, most in (
        ("examples", rows * epochs, limits.job_examples),
        ("tokens", training.bytes // BYTES_PER_TOKEN * epochs, limits.job_tokens),
    ):
        if most is not None and estimate > most:
            raise RequestInvalid(
                f"the job would have about {estimate:,} {name} in {epochs} epochs of {rows:,} "
                f"rows, and the limit job_{name} is {most:,}: give a smaller n_epochs or fewer "
                "rows",
                f"{_where(wanted)}.n_epochs",
            )


async def _check_room(
    services: Services, caller: Principal, session: AsyncSession, suffix: str | None
) -> None:
    limits = services.quotas.limits(caller)
    if (
        limits.jobs is not None
        and await fine_tuning.unfinished_jobs_of(session, caller.tenant_id) >= limits.jobs
    ):
        raise RateLimited(
            f"the limit of {limits.jobs} unfinished jobs is reached; wait, or cancel one first",
            60.0,
        )
    await check_adapters_of_jobs(session, caller.tenant_id, limits, suffix)
    await check_room(session, caller.tenant_id, limits, size=1)  # a result has at least this
