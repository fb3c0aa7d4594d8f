"""Jobs of several tenants while workers, the gateway and the database's connections are killed, and what must hold after.

Everything runs as it does in production: worker and gateway processes over one database and the two stores, started again
whenever they end, as an orchestrator would. The engine is the fake one. SQLite has no connections to kill, so there its
write lock is held for a while instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sqlite3
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select, text

from reft_serve.adapters.directory import read_adapter
from reft_serve.database import files, keys
from reft_serve.database.connection import FAILURES
from reft_serve.database.models import Event, File, Job, Tenant, Version, now_ms
from reft_serve.errors import Conflict
from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Served
from tests.support.training.jobs import FINAL, MODEL, Place, rows

__all__ = ["Chaos", "Tally"]

_LEASE_SECONDS = 4.0
_LAST_EVENTS = {
    "succeeded": "The job has successfully completed", "cancelled": "The job was cancelled", "failed": "The job failed",
}  # fmt: skip


@dataclass
class Tally:
    """What happened."""

    jobs: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    claims: int = 0
    lost_leases: int = 0
    resumed: int = 0
    versions: int = 0
    compared: int = 0
    answers: int = 0
    most_processes_of_a_job: int = 0
    looks: int = 0
    orphans: list[str] = field(default_factory=list)
    seconds: float = 0.0


class _Process:
    """A process that is started again whenever it ends, until `stop`."""

    def __init__(
        self, name: str, command: list[str], environment: dict[str, str], log: Path
    ) -> None:
        self.name, self._command, self._environment, self._log = name, command, environment, log
        self.process: asyncio.subprocess.Process | None = None
        self._keeping = asyncio.create_task(self._keep())
        self._stopping = False

    async def _keep(self) -> None:
        while not self._stopping:
            with self._log.open("ab") as log:
                self.process = await asyncio.create_subprocess_exec(
                    *self._command, env=self._environment, stdout=log, stderr=log
                )
            await self.process.wait()
            await asyncio.sleep(0.2)

    def kill(self) -> bool:
        """Kill it as a power cut would; its own children find out by themselves."""
        if self.process is None or self.process.returncode is not None:
            return False
        self.process.send_signal(signal.SIGKILL)
        return True

    async def stop(self) -> None:
        self._stopping = True
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
        await asyncio.wait_for(self._keeping, 60)


class Chaos:
    """One run: `jobs` jobs of `tenants` tenants, whose data and settings repeat every `kinds`."""

    def __init__(
        self, place: Place, *, seed: int, kinds: int, hyperparameters: dict[str, Any]
    ) -> None:
        self.place, self.tally = place, Tally()
        self._choose, self._kinds, self._hyperparameters = (
            random.Random(seed),
            kinds,
            hyperparameters,
        )
        self._tenants: list[tuple[Tenant, str]] = []
        self._jobs: dict[str, int] = {}
        self._asked: dict[str, str] = {}
        self._undisturbed: dict[int, list[str]] = {}
        self._processes: list[_Process] = []
        self._gateway_url = ""

    async def undisturbed(self) -> None:
        """Run one job of each kind with nothing in its way."""
        tenant = await self.place.tenant()
        async with self.place.worker("calm"):
            for kind in range(self._kinds):
                job_id = await self._ask(tenant, kind)
                await self.place.until(job_id, "succeeded")
                self._undisturbed[kind] = await self.place.version_digests(job_id)

    async def ask(self, tenants: int, jobs: int) -> None:
        """Put the jobs into the queue, in turns for the tenants."""
        for _ in range(tenants):
            tenant = await self.place.tenant()
            async with self.place.database.writing() as session:
                _, secret = await keys.create_key(session, tenant, "owner")
            self._tenants.append((tenant, secret))
        for number in range(jobs):
            kind = number % self._kinds
            self._jobs[await self._ask(self._tenants[number % tenants][0], kind)] = kind
        self.tally.jobs = jobs

    async def _ask(self, tenant: Tenant, kind: int) -> str:
        held_out = rows(1000 + kind, 4) if kind % 2 else None
        return await self.place.job(
            tenant, rows(kind), seed=kind, held_out=held_out, **self._hyperparameters
        )

    @contextlib.asynccontextmanager
    async def processes(self, workers: int) -> AsyncIterator[None]:
        """Workers, a gateway and the engine, for as long as the block."""
        served = await asyncio.to_thread(lambda: Served(FakeEngine(remember=False).app))
        port = _free_port()
        self._gateway_url = f"http://127.0.0.1:{port}"
        folder = self.place.folder
        shared = os.environ | {
            "REFT_DATABASE": self.place.url, "REFT_STORE": str(folder / "adapters"), "REFT_BLOBS": self.place.blobs_url,
            "REFT_ENGINES": served.url, "REFT_MODEL": str(MODEL), "REFT_POLL_SECONDS": "0.2", "REFT_TRAIN_JOBS": "1",
            "REFT_LEASE_SECONDS": str(_LEASE_SECONDS), "REFT_SWEEP_SECONDS": "5", "REFT_TRAIN_THREADS": "1",
            # A machine that dies every few seconds is not the job's fault.
            "REFT_TRAIN_ATTEMPTS": "50",
        }  # fmt: skip
        gateway = [sys.executable, "-m", "reft_serve.cli.gateway", "--port", str(port)]
        self._processes = [
            _Process(
                "gateway", gateway, shared | {"REFT_GATEWAY_NAME": "chaos"}, folder / "gateway.log"
            )
        ]
        for number in range(workers):
            own = {
                "REFT_WORKER_NAME": f"worker-{number}",
                "REFT_WORK": str(folder / f"work-{number}"),
            }
            command = [sys.executable, "-m", "reft_serve.cli.worker"]
            self._processes.append(
                _Process(f"worker-{number}", command, shared | own, folder / f"worker-{number}.log")
            )
        try:
            yield
        finally:
            await asyncio.gather(*(process.stop() for process in self._processes))
            await asyncio.to_thread(served.stop)

    async def run(self, every: tuple[float, float], most: float, most_kills: int = 1 << 30) -> None:
        """Kill something at random every so many seconds until every job has ended, or fail after `most` seconds."""
        begun = time.monotonic()
        looking = asyncio.create_task(self._look())
        asking = asyncio.create_task(self._change_minds())
        try:
            due = time.monotonic() + self._choose.uniform(*every)
            while not await self._all_ended():
                assert time.monotonic() < begun + most, await self._unfinished()
                await asyncio.sleep(0.2)
                if (
                    time.monotonic() > due
                    and self.tally.kills.total() < most_kills
                    and await self._kill()
                ):
                    due = time.monotonic() + self._choose.uniform(*every)
        finally:
            for task in (looking, asking):
                task.cancel()
            await asyncio.gather(looking, asking, return_exceptions=True)
        self.tally.seconds = round(time.monotonic() - begun, 1)

    async def _kill(self) -> bool:
        """Whether there was something to kill: of the workers only one that has a job, else it would show nothing."""
        victim = (
            "worker"
            if not self.tally.kills
            else self._choose.choices(["worker", "gateway", "database"], [6, 2, 2])[0]
        )
        if victim == "database":
            await self._disturb_database()
        else:
            busy = await self._try(self._holders) if victim == "worker" else {victim}
            alike = [process for process in self._processes if process.name in busy]
            if not alike or not self._choose.choice(alike).kill():
                return False
        self.tally.kills[victim] += 1
        return True

    async def _holders(self) -> set[str]:
        async with self.place.database.reading() as session:
            found = await session.scalars(select(Job.worker).where(Job.status == "running"))
            return {worker.partition("/")[0] for worker in found if worker}

    async def _disturb_database(self) -> None:
        if self.place.database.is_sqlite:
            path = self.place.url.removeprefix("sqlite:///")
            await asyncio.to_thread(_hold_lock, path, self._choose.uniform(0.5, 2.0))
            return
        found = await self._try(lambda: self._backends("pid"))
        if found and self._choose.random() < 0.3:
            # One backend dead of SIGKILL: the server ends all sessions and recovers from its log.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._choose.choice(found), signal.SIGKILL)
        else:
            await self._try(lambda: self._backends("pg_terminate_backend(pid)"))

    async def _backends(self, what: str) -> list[Any]:
        """Something of every session of the database but this one."""
        others = (
            "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        async with self.place.database.reading() as session:
            return list(await session.scalars(text(f"SELECT {what} {others}")))

    async def _change_minds(self) -> None:
        """Cancel every tenth job, and pause another tenth for a moment, whatever they are at."""
        for number, job_id in enumerate(self._jobs):
            what = {4: "cancel", 7: "pause"}.get(number % 10)
            if what is None:
                continue
            self._asked[job_id] = what
            with contextlib.suppress(
                Conflict
            ):  # it has ended; or was asked already, over a connection that was cut
                await self._try(lambda job_id=job_id, what=what: self.place.ask(job_id, what))
            if what == "pause":
                while (
                    await self._try(lambda job_id=job_id: self.place.find(job_id))
                ).status == "running":
                    await asyncio.sleep(0.1)
                with contextlib.suppress(Exception):
                    await self._try(lambda job_id=job_id: self.place.ask(job_id, "resume"))
            await asyncio.sleep(self._choose.uniform(0.5, 2.0))

    async def _try(self, action: Callable[[], Any]) -> Any:
        """Do something that the database may be away for."""
        for _ in range(100):
            try:
                return await action()
            except FAILURES:
                await asyncio.sleep(0.2)
        raise AssertionError("the database did not come back")

    async def _look(self) -> None:
        """How many processes train each job at once, told by their folders."""
        while True:
            found: defaultdict[str, int] = defaultdict(int)
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    folder = Path(os.readlink(process / "cwd"))
                    if folder.parent.parent == self.place.folder and folder.parent.name.startswith(
                        "work-"
                    ):
                        for data in folder.glob("file-*.jsonl"):
                            found[data.name] += 1
            self.tally.looks += 1
            self.tally.most_processes_of_a_job = max(
                self.tally.most_processes_of_a_job, *found.values(), 0
            )
            await asyncio.sleep(0.1)

    async def _all_ended(self) -> bool:
        jobs = await self._try(lambda: self._found(self._jobs))
        return all(job.status in FINAL for job in jobs)

    async def _found(self, job_ids: Any) -> list[Job]:
        async with self.place.database.reading() as session:
            return list(await session.scalars(select(Job).where(Job.id.in_(list(job_ids)))))

    async def _unfinished(self) -> list[Any]:
        jobs = await self._found(self._jobs)
        return [
            (job.id, job.status, job.step, await self.place.told(job.id))
            for job in jobs
            if job.status not in FINAL
        ]

    async def judge(self) -> None:
        """Check everything that must hold; called while the processes run on."""
        await self._settled()
        for job in await self._found(self._jobs):
            await self._judge_job(job)
        assert self.tally.most_processes_of_a_job == 1, "a job ran twice at once"
        await self._ask_all()

    async def _settled(self) -> None:
        """What was deleted is gone: a sweep takes what a killed process left, once it is old enough."""
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            async with self.place.database.writing() as session:
                for file_id in await files.swept_files(
                    session, now_ms()
                ):  # as a gateway does, later
                    await self.place.blobs.delete(files.key_of_blob(file_id))
                    await files.forget_file(session, file_id)
            self.tally.orphans = await self._orphans()
            if not self.tally.orphans:
                break
            await asyncio.sleep(0.5)
        assert self.tally.orphans == []

    async def _orphans(self) -> list[str]:
        async with self.place.database.reading() as session:
            named = set(await session.scalars(select(File.id)))
        strays = [
            blob.key
            for blob in await self.place.blobs.list("files")
            if blob.key.rpartition("/")[2] not in named
        ]
        return strays + await self.place.orphans()

    async def _judge_job(self, job: Job) -> None:
        told = await self.place.told(job.id)
        finals = [
            line for line in told if any(line.startswith(last) for last in _LAST_EVENTS.values())
        ]
        assert len(finals) == 1, told
        assert finals[0].startswith(_LAST_EVENTS[job.status])
        assert told[-1] == finals[0], "nothing is told of a job that has ended"
        digests = await self.place.version_digests(job.id)
        if self._asked.get(job.id) == "cancel" and job.status == "cancelled":
            assert digests == []
            assert (job.version_id, job.result_file_id) == (None, None)
        else:
            assert job.status == "succeeded", (job.status, job.error, job.traceback, told)
            assert digests == self._undisturbed[self._jobs[job.id]], (
                "the weights are those of an undisturbed run"
            )
            self.tally.compared += len(digests)
        self.tally.ended[job.status] += 1
        self.tally.claims += sum(
            line in ("Fine-tuning job started", "The fine-tuning job continues") for line in told
        )
        self.tally.resumed += sum(line == "The fine-tuning job continues" for line in told)
        self.tally.lost_leases += sum(line.startswith("The worker was lost") for line in told)

    async def _ask_all(self) -> None:
        """Every version of every tenant is whole in the store, and answers through the gateway to its tenant."""
        async with self.place.database.reading() as session:
            versions = list(
                (
                    await session.scalars(
                        select(Version).where(Version.source.in_(list(self._jobs)))
                    )
                ).unique()
            )
        secrets_of = {tenant.id: secret for tenant, secret in self._tenants}
        async with httpx.AsyncClient(
            base_url=self._gateway_url, trust_env=False, timeout=30
        ) as http:
            await _until_ready(http)
            for version in versions:
                adapter = await asyncio.to_thread(
                    read_adapter, self.place.store.path(version.digest)
                )
                assert adapter.digest == version.digest
                headers = {"authorization": f"Bearer {secrets_of[version.adapter.tenant_id]}"}
                body = {"model": version.model_id, "prompt": "Tell me", "max_tokens": 2}
                answer = await http.post("/v1/completions", json=body, headers=headers)
                assert answer.status_code == 200, answer.text
                self.tally.answers += 1
        self.tally.versions = len(versions)

    async def events(self) -> int:
        """How many events there are."""
        async with self.place.database.reading() as session:
            return len(list(await session.scalars(select(Event.id))))

    async def leftovers(self) -> list[str]:
        """Processes of jobs that outlived their workers."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(self.place.folder) in os.readlink(process / "cwd"):
                    found.append(process.name)
        return found


async def _until_ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await http.get("/health/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.1)


def _hold_lock(path: str, seconds: float) -> None:
    connection = sqlite3.connect(path, timeout=15, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
