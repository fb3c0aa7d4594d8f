"""Jobs of tenants, and workers for them, in one process: each worker with a scratch of its own, as on another machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import select

import reft_serve.demo
from reft_serve.adapters.store import AdapterStore
from reft_serve.config import TrainerSettings
from reft_serve.database import adapters, files, tenants
from reft_serve.database.connection import Database
from reft_serve.database.jobs import fine_tuning
from reft_serve.database.jobs.fine_tuning import NewJob
from reft_serve.database.models import File, Job, Tenant, Version
from reft_serve.storage.blobs import BlobStore
from reft_serve.training.jobs.worker import Worker, running

MODEL = Path(reft_serve.demo.__file__).parent / "model"
FINAL = ("succeeded", "failed", "cancelled")
# Dropout draws from the random generator in every step, so a run that was not resumed bit for bit shows it.
QUICK: dict[str, Any] = {"n_epochs": 2, "batch_size": 4, "dropout": 0.1, "save_every": 2, "rank": 2}


def rows(seed: int, count: int = 12, words: int = 6) -> bytes:
    """A data file of completions."""
    choose = random.Random(seed)
    known = ["bird", "cat", "rain", "tree", "song", "house", "river", "little", "red", "happy"]
    lines = [
        {
            "prompt": f"Tell me of {choose.choice(known)} {k}",
            "completion": " " + " ".join(choose.choices(known, k=words)),
        }
        for k in range(count)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


class Place:
    """A database and stores, with what a test does to them."""

    def __init__(
        self, folder: Path, database: Database, url: str, blobs: str | None = None
    ) -> None:
        self.folder, self.database, self.url = folder, database, url
        self.blobs_url = blobs or str(folder / "blobs")
        self.blobs, self.store = BlobStore(self.blobs_url), AdapterStore(folder / "adapters")

    def settings(self, name: str = "one", **changed: Any) -> TrainerSettings:
        given: dict[str, Any] = {
            "database": self.url, "store": self.folder / "adapters", "blobs": self.blobs_url, "model": str(MODEL),
            "work": self.folder / f"work-{name}", "worker_name": name, "poll_seconds": 0.1, "lease_seconds": 10.0,
            "train_jobs": 1, "train_threads": 1, "patience_seconds": 5.0,
        }  # fmt: skip
        return TrainerSettings(**(given | changed))

    @contextlib.asynccontextmanager
    async def worker(self, name: str = "one", **changed: Any) -> AsyncIterator[Worker]:
        """A worker at work; it ends in order at the end of the block."""
        async with running(self.settings(name, **changed)) as worker:
            working = asyncio.create_task(worker.run())
            try:
                yield worker
            finally:
                worker.end()
                await working

    async def tenant(self) -> Tenant:
        async with self.database.writing() as session:
            return await tenants.create_tenant(session, f"t{secrets.token_hex(4)}")

    async def file(self, tenant: Tenant, content: bytes) -> str:
        async with self.database.writing() as session:
            file_id = await files.start_file(
                session,
                tenant.id,
                None,
                filename="data.jsonl",
                purpose="fine-tune",
                expires_ms=None,
            )

        async def chunks() -> AsyncIterator[bytes]:
            yield content

        written = await self.blobs.write(files.key_of_blob(file_id), chunks(), 1 << 30)
        async with self.database.writing() as session:
            facts = files.WrittenFile(
                file_id, written.size, written.sha256, "completion", content.count(b"\n")
            )
            await files.complete_file(session, facts)
        return file_id

    async def job(
        self,
        tenant: Tenant | None = None,
        content: bytes | None = None,
        seed: int = 7,
        held_out: bytes | None = None,
        method: str = "supervised",
        parent: Version | None = None,
        **hyperparameters: Any,
    ) -> str:
        """Ask for a job, and give its id."""
        tenant = tenant or await self.tenant()
        training = await self.file(tenant, rows(seed) if content is None else content)
        validation = None if held_out is None else await self.file(tenant, held_out)
        async with self.database.writing() as session:
            wanted = NewJob(
                "base", training, validation, {"type": method}, QUICK | hyperparameters, seed
            )
            if parent is not None:
                wanted = replace(wanted, parent_model=parent.model_id, parent_digest=parent.digest)
            return (await fine_tuning.create_job(session, tenant, None, wanted)).id

    async def find(self, job_id: str) -> Job:
        async with self.database.reading() as session:
            return await fine_tuning.find_job(session, None, job_id)

    async def ask(self, job_id: str, what: Any) -> Job:
        job = await self.find(job_id)
        async with self.database.writing() as session:
            return await fine_tuning.request_change(session, job.tenant_id, job_id, what)

    def steps_done(self, worker: str) -> int:
        """How many steps the job of a worker has really done, whatever the database knows of it yet."""
        (record,) = self.folder.glob(f"work-{worker}/*/run/metrics.jsonl")
        return max(json.loads(line)["step"] for line in record.read_text().split("\n")[:-1])

    async def until(self, job_id: str, *statuses: str, seconds: float = 120) -> Job:
        """The job, once it has one of these statuses."""
        return await self.wait(job_id, lambda job: job.status in statuses, seconds)

    async def wait(self, job_id: str, what: Callable[[Job], bool], seconds: float = 120) -> Job:
        deadline = time.monotonic() + seconds
        while not what(job := await self.find(job_id)):
            assert time.monotonic() < deadline, (
                job.status,
                job.step,
                job.error,
                job.traceback,
                await self.told(job_id),
            )
            assert job.status not in FINAL, (job.status, job.error, job.traceback)
            await asyncio.sleep(0.02)
        return job

    async def told(self, job_id: str) -> list[str]:
        """The messages of a job's events, the oldest first."""
        async with self.database.reading() as session:
            return [
                event.message for event in await fine_tuning.events_since(session, job_id, 0, 5000)
            ]

    async def version_digests(self, job_id: str) -> list[str]:
        """The digests of a job's versions in their order, its own the last."""
        async with self.database.reading() as session:
            query = select(Version.digest).where(Version.source == job_id).order_by(Version.number)
            return list(await session.scalars(query))

    async def orphans(self) -> list[str]:
        """What lies in the stores and that no row names."""
        found = []
        async with self.database.reading() as session:
            for digest, _ in self.store.digests():
                if not await adapters.is_used(session, digest):
                    found.append(f"version {digest}")
            named = set(await session.scalars(select(File.id).where(File.status == "processed")))
            unfinished = set(await session.scalars(select(Job.id).where(Job.status.not_in(FINAL))))
        found += [
            blob.key
            for blob in await self.blobs.list("files")
            if blob.key.rpartition("/")[2] not in named
        ]
        found += [
            blob.key
            for blob in await self.blobs.list("checkpoints")
            if blob.key.split("/")[1] not in unfinished
        ]
        found += [str(path) for path in self.folder.glob("adapters/.staging/*")]
        found += [str(path) for path in self.folder.glob("blobs/.writing/*")]
        found += [str(path) for path in self.folder.glob("work-*/*")]
        return found
