"""Inputs of a job: its files and the checkpoint to resume from, copied to a folder of this machine,
and the variables of its integrations.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

from reft_serve.database.files import key_of_blob, needed_file
from reft_serve.database.jobs.outcomes import Failed
from reft_serve.database.jobs.queue import Claim
from reft_serve.database.names import check_adapter_name
from reft_serve.errors import BlobMissing, NotFound, RequestInvalid, StoreUnusable
from reft_serve.storage.blobs import Blob
from reft_serve.training.jobs.context import WorkerContext
from reft_serve.training.jobs.messages import RUN
from reft_serve.training.loop import archive

__all__ = [
    "Unfit",
    "check_name",
    "checkpoint_key",
    "checkpoints_of",
    "fetch_checkpoint",
    "fetch_file",
    "fetch_parent",
    "report_variables",
]


class Unfit(Exception):
    """The job cannot be done, now or later."""

    def __init__(self, failure: Failed) -> None:
        self.failure = failure
        super().__init__(failure.message)


def check_name(claim: Claim) -> None:
    """Check, before training, the name of the version that the job creates.

    Raises:
        Unfit: the name is reserved, which an earlier version of reft-serve did not ask.
    """
    try:
        check_adapter_name(claim.adapter, claim.model, claim.tenant, "suffix")
    except RequestInvalid as exc:
        raise Unfit(
            Failed("reserved_name", f"{exc}: create a new job with another suffix", "suffix")
        ) from exc


async def fetch_file(ctx: WorkerContext, file_id: str, param: str, folder: Path) -> Path:
    """A data file, as it was uploaded.

    Raises:
        Unfit: it is gone, or its bytes are not those that were checked.
        StoreUnusable, and what a database raises: try again.
    """
    path = folder / f"{file_id}.jsonl"
    try:
        async with ctx.database.reading() as session:
            row = await needed_file(session, file_id)
        written = await ctx.blobs.fetch(key_of_blob(file_id), path)
    except (NotFound, BlobMissing) as exc:
        sentence = f"file {file_id} no longer exists: upload it again and create a new job"
        raise Unfit(Failed("file_missing", sentence, param)) from exc
    if written.sha256 != row.sha256:
        sentence = (
            f"file {file_id} was damaged after its upload: upload it again and create a new job"
        )
        raise Unfit(Failed("file_damaged", sentence, param))
    return path


async def fetch_parent(ctx: WorkerContext, claim: Claim, folder: Path) -> Path | None:
    """A copy of the version to continue from; None if the job makes a new adapter.

    Raises:
        Unfit: it was deleted.
        OSError: the store or the disk cannot be used.
    """
    if claim.parent_digest is None:
        return None
    source, copy = ctx.store.path(claim.parent_digest), folder / "parent"
    try:
        await asyncio.to_thread(shutil.copytree, source, copy)
    except (FileNotFoundError, shutil.Error) as exc:
        if source.is_dir():
            raise
        sentence = (
            f"the model {claim.parent_model} was deleted: create a new job with another model"
        )
        raise Unfit(Failed("model_missing", sentence, "model")) from exc
    return copy


async def fetch_checkpoint(ctx: WorkerContext, claim: Claim, folder: Path) -> int | None:
    """Bring the job's newest sound checkpoint to `folder/run`, and give its step; None if there is
    none. A damaged one is removed, and the one before it taken.
    """
    for blob in reversed(await checkpoints_of(ctx, claim.id)):
        packed = folder / "checkpoint.tar"
        try:
            await ctx.blobs.fetch(blob.key, packed)
        except BlobMissing:
            continue
        try:
            await asyncio.to_thread(archive.unpack, packed, folder / RUN)
        except StoreUnusable:
            shutil.rmtree(folder / RUN, ignore_errors=True)
            await ctx.blobs.delete(blob.key)
            continue
        finally:
            packed.unlink(missing_ok=True)
        return int(blob.key.rpartition("-")[2].partition(".")[0])
    return None


async def checkpoints_of(ctx: WorkerContext, job_id: str) -> list[Blob]:
    """The stored checkpoints of a job, the oldest first."""
    return await ctx.blobs.list(f"checkpoints/{job_id}")


def checkpoint_key(job_id: str, step: int) -> str:
    """Where a checkpoint is stored."""
    return f"checkpoints/{job_id}/step-{step:09}.tar"


def report_variables(claim: Claim) -> dict[str, dict[str, str]]:
    """Environment variables of the integrations that the job asks for."""
    reports: dict[str, dict[str, str]] = {}
    for integration in claim.integrations:
        asked: dict[str, Any] = integration.get("wandb") or {}
        if integration.get("type") == "wandb":
            variables = {"WANDB_PROJECT": asked.get("project"), "WANDB_ENTITY": asked.get("entity")}
            variables |= {
                "WANDB_NAME": asked.get("name") or claim.id,
                "WANDB_TAGS": ",".join(asked.get("tags") or []),
            }
            reports["wandb"] = {name: str(value) for name, value in variables.items() if value} | {
                "WANDB_SILENT": "true"
            }
    return reports
