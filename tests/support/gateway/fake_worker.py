"""A worker that trains nothing: it takes jobs from the database and ends them as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.adapters.store import AdapterStore
from reft_serve.config import GatewaySettings
from reft_serve.database import files
from reft_serve.database.connection import Database
from reft_serve.database.jobs import claimed, queue
from reft_serve.database.jobs.outcomes import NewCheckpoint, NewVersion, Outcome, Succeeded
from reft_serve.storage.blobs import BlobStore
from tests.support.gateway.harness import adapter_files

T = TypeVar("T")
CSV = b"step,train_loss\n1,2.0\n2,1.0\n"


class FakeWorker:
    """Each call is a transaction of its own on a connection of its own."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings

    def act(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        async def acting() -> T:
            database = Database(self.settings.database)
            try:
                async with database.writing() as session:
                    return await work(session)
            finally:
                await database.close()

        return asyncio.run(acting())

    def claim(self) -> queue.Claim:
        found = self.act(lambda session: queue.claim(session, "fake", 60.0))
        assert found is not None
        return found

    def beat(self, job: queue.Claim, step: int = 0, steps: int = 4) -> str:
        progress = claimed.Progress(step, steps, step * 100, job.created_ms + 60_000)
        return self.act(
            lambda session: claimed.heartbeat(session, job.id, job.worker, 60.0, progress)
        )

    def tell(self, job: queue.Claim, message: str, metrics: dict[str, float] | None = None) -> None:
        self.act(
            lambda session: claimed.add_event(session, job.id, job.worker, message, metrics=metrics)
        )

    def finish(self, job: queue.Claim, outcome: Outcome) -> str:
        return self.act(lambda session: claimed.finish(session, job.id, job.worker, outcome))

    def release(self, job: queue.Claim, traceback: str) -> str:
        return self.act(lambda session: claimed.release(session, job.id, job.worker, traceback))

    def succeed(self, job: queue.Claim, seed: int = 0) -> str:
        """Publish an adapter with two checkpoints and a file of metrics."""
        versions = [self._publish(seed + k) for k in range(3)]
        checkpoints = [NewCheckpoint(k + 1, {"train_loss": 2.0 - k}, versions[k]) for k in range(2)]
        written = self._write_result(job)
        return self.finish(job, Succeeded(versions[2], checkpoints, 400, written))

    def _publish(self, seed: int) -> NewVersion:
        store = AdapterStore(self.settings.store)
        with store.staging() as staged:
            for name, content in adapter_files(seed).items():
                (staged / name).write_bytes(content)
            return NewVersion(store.publish(staged), "tiny", 100)

    def _write_result(self, job: queue.Claim) -> files.WrittenFile:
        begun = self.act(
            lambda session: files.start_file(
                session,
                job.tenant_id,
                None,
                filename="metrics.csv",
                purpose="fine-tune-results",
                expires_ms=None,
            )
        )

        async def chunks() -> AsyncIterator[bytes]:
            yield CSV

        blobs = BlobStore(self.settings.blobs_url)
        written = asyncio.run(blobs.write(files.key_of_blob(begun), chunks(), 1 << 20))
        return files.WrittenFile(begun, written.size, written.sha256)
