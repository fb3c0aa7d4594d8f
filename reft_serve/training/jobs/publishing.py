"""A run that is done: its versions go to the adapter store, its metrics to the file store, then one
transaction names all.

What fails before that transaction leaves files that no row names. They are removed at once where
the worker lives, and swept up later if it does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import shutil
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from reft_serve.adapters.structure import FILES, check_structure
from reft_serve.database import adapters, files
from reft_serve.database.files import WrittenFile
from reft_serve.database.jobs.claimed import finish
from reft_serve.database.jobs.outcomes import NewCheckpoint, NewVersion, Status, Succeeded
from reft_serve.database.jobs.queue import Claim
from reft_serve.database.room import lock_room
from reft_serve.training.jobs.context import WorkerContext
from reft_serve.training.loop import checkpoints
from reft_serve.training.loop.report import METRICS, read_metrics

__all__ = ["openai_metrics", "publish", "result_csv", "retract"]

_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_MOST_RESULT_BYTES = 1 << 30
# What a version records of where it comes from.
_LINEAGE = ("parent", "parent_sha256", "parent_step", "step", "data_sha256", "held_out_sha256")


@dataclass(frozen=True, slots=True)
class _Made:
    """A version in the store, and where its files came from."""

    version: NewVersion
    source: Path


async def publish(ctx: WorkerContext, claim: Claim, run: Path, tokens: int) -> Status:
    """Publish what a run has made, and end the job; the answer is how it ended. To call it again
    after a failure is safe.

    Raises:
        LeaseLost: the job is not ours any longer (or is ended already, by a call whose answer was
            lost).
        StoreUnusable, and what a database raises: try again, or give the job back.
    """
    versions: list[_Made] = []
    try:
        for source in (run / "adapter", *checkpoints.sealed(run / "checkpoints").values()):
            versions.append(await asyncio.to_thread(_store, ctx, claim, source))
        metrics = openai_metrics(read_metrics(run / METRICS))
        steps = [
            NewCheckpoint(step, metrics.get(step, {}), each.version)
            for step, each in zip(
                checkpoints.sealed(run / "checkpoints"), versions[1:], strict=True
            )
        ]
        result = await _write_result(ctx, claim, run)
        outcome = Succeeded(versions[0].version, steps, tokens, result)
        async with ctx.database.writing() as session:
            await lock_room(session, claim.tenant_id)
            for each in sorted(
                {each.version.digest: each for each in versions}.values(),
                key=lambda e: e.version.digest,
            ):
                await ctx.database.lock(session, each.version.digest)
                # its last owner removed it in this moment
                if not ctx.store.path(each.version.digest).is_dir():
                    await asyncio.to_thread(_store, ctx, claim, each.source)
            status = await finish(session, claim.id, claim.worker, outcome, ctx.settings.limits)
    except BaseException:
        await asyncio.shield(_forgive(ctx, versions))
        raise
    # what was not named: all, or some checkpoints
    await retract(ctx, (each.version.digest for each in versions))
    return status


async def retract(
    ctx: WorkerContext, digests: Iterable[str], *, older_than_ms: int | None = None
) -> int:
    """Remove the versions that no row names from the store, and give their number.

    Args:
        ctx: of this worker.
        digests: of versions that may be there.
        older_than_ms: leave what has changed since then.
    """
    removed = 0
    for digest in set(digests):
        async with ctx.database.writing() as session:
            await ctx.database.lock(session, digest)
            if await adapters.is_used(session, digest):
                continue
            changed = await asyncio.to_thread(_changed_ms, ctx.store.path(digest))
            if changed is not None and (older_than_ms is None or changed < older_than_ms):
                await asyncio.to_thread(ctx.store.remove, digest)
                removed += 1
    return removed


def openai_metrics(lines: Iterable[Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """The numbers of each step by OpenAI's names."""
    names = {
        "loss": ("train_loss",),
        "token_accuracy": ("train_mean_token_accuracy",),
        "eval_loss": ("valid_loss", "full_valid_loss"),
        "eval_token_accuracy": ("valid_mean_token_accuracy", "full_valid_mean_token_accuracy"),
    }
    rows: dict[int, dict[str, float]] = {}
    for line in lines:
        step = rows.setdefault(int(line["step"]), {"step": int(line["step"])})
        step |= {name: line[ours] for ours in names if ours in line for name in names[ours]}
    return rows


def result_csv(lines: Iterable[Mapping[str, float]]) -> bytes:
    """The metrics of a run, a line for each step, in the columns of OpenAI's result files."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    for step, metrics in sorted(openai_metrics(lines).items()):
        row = metrics | {"train_accuracy": metrics.get("train_mean_token_accuracy")}
        table.writerow([step, *(_number(row.get(name)) for name in _COLUMNS[1:])])
    return text.getvalue().encode()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


async def _write_result(ctx: WorkerContext, claim: Claim, run: Path) -> WrittenFile:
    content = result_csv(read_metrics(run / METRICS))
    name = f"{claim.id}-metrics.csv"
    async with ctx.database.writing() as session:
        file_id = await files.start_file(
            session,
            claim.tenant_id,
            None,
            filename=name,
            purpose="fine-tune-results",
            expires_ms=None,
        )

    async def chunks() -> AsyncIterator[bytes]:
        yield content

    written = await ctx.blobs.write(files.key_of_blob(file_id), chunks(), _MOST_RESULT_BYTES)
    return WrittenFile(file_id, written.size, written.sha256)


def _store(ctx: WorkerContext, claim: Claim, source: Path) -> _Made:
    """Put a version into the store. Blocks."""
    with ctx.store.staging() as staged:
        for name in FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, staged / name)
        manifest = check_structure(staged, source.name)
        size = sum(file.stat().st_size for file in staged.iterdir())
        digest = ctx.store.publish(staged)
    lineage = {name: manifest.provenance[name] for name in _LINEAGE if name in manifest.provenance}
    facts = {**manifest.summary(), "lineage": {"job": claim.id, **lineage}}
    return _Made(NewVersion(digest, manifest.base_model.name, size, facts), source)


def _changed_ms(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns // 1_000_000
    return None


async def _forgive(ctx: WorkerContext, versions: Iterable[_Made]) -> None:
    """Remove versions that were not recorded, if possible now; else the clean-up will."""
    with contextlib.suppress(Exception):
        await asyncio.wait_for(retract(ctx, [each.version.digest for each in versions]), 10.0)
