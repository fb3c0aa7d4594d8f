"""Streams, in the middle of which something is killed, and the judge of what is left.

An answer follows from model and prompt (the fake engine's are made so, a real one's are greedy), so that every piece of an
answer can be told right from wrong. Only where a real engine's two likeliest tokens are as good as equal do the last bits of
its sums decide, which differ from batch to batch: from there on an answer may go its own way, and is counted as undecided.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp
import httpx
from sqlalchemy import func, select, text

from reft_serve.database.connection import Database
from reft_serve.database.models import Admission, Usage
from tests.support.gateway.harness import first_key
from tests.support.gateway.process import free_port
from tests.support.killing.killable import FAKE, EngineKind, Kept

_SPREAD_SECONDS = 0.5
_TIE = 1e-4  # in logprobs, which differ by about 1e-5 from batch to batch
_RUNNING = re.compile(
    rb"^vllm:num_requests_(?:running|waiting)(?:\{.*\})? ([0-9.e+]+)$", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a caller had of one stream. `ended`: whole, refused (an error instead), failed (an error inside) or cut."""

    model: str
    prompt: str
    request_id: str | None
    words: tuple[str, ...]
    ended: str
    # By how much each token was likelier than the next best; empty where the engine has no likelihoods.
    gaps: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Round:
    """One round's streams by how they ended, the seconds until a request was answered again, and every fault."""

    ended: Counter[str]
    recovery_seconds: float
    faults: list[str]
    undecided: int = 0


@dataclass
class Scene:
    """An engine, a gateway over it, and a database; one tenant's streams."""

    folder: Path
    database: str
    url: str
    engine_url: str
    engine: Kept
    gateway: Kept
    kind: EngineKind
    key: str
    key_id: str
    probe_key: str
    models: tuple[str, ...] = ("base", "birds")
    delivered: int = 0
    reference: dict[tuple[str, str], Seen] = field(default_factory=dict)

    async def play(self, streams: int, kill: Callable[[], None] | None, share: float) -> Round:
        """Streams from all sides, `kill` once this share of their tokens has come, and what is left when all is quiet."""
        async with self._client() as client:
            known, self.delivered = await self._usage(), 0
            storm = [asyncio.create_task(self._stream(client, k, streams)) for k in range(streams)]
            recovery = 0.0
            if kill is not None:
                while self.delivered < share * streams * self.kind.tokens:
                    await asyncio.sleep(0.005)
                begun = time.monotonic()
                await asyncio.to_thread(kill)
                await self._answered(client)
                recovery = time.monotonic() - begun
            seen = await asyncio.gather(*storm)
            await self._answered(client)
            others = [(each, self._compared(each)) for each in seen]
            faults = [
                f"{each.request_id}: a wrong answer" for each, other in others if other == "wrong"
            ]
            faults += [*await self._miscounted(seen, known), *await self._orphans(client)]
        if not self.reference:
            self.reference = {(each.model, each.prompt): each for each in seen}
        undecided = sum(other == "undecided" for _, other in others)
        return Round(Counter(each.ended for each in seen), recovery, faults, undecided)

    def _client(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=self.kind.start_seconds)
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)

    async def _stream(self, client: aiohttp.ClientSession, number: int, streams: int) -> Seen:
        model, prompt = self.models[number % len(self.models)], f"prompt {number}"
        await asyncio.sleep(random.random() * _SPREAD_SECONDS)
        # With logprobs a real engine names the tokens of a chunk, which may be several, or none that is text yet.
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": self.kind.tokens,
            "stream": True,
            "logprobs": 2,
        }
        body |= {"temperature": 0, "ignore_eos": True}
        identity, words, gaps, ended = None, [], [], "cut"
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with client.post(
                f"{self.url}/v1/completions", json=body, headers=_bearer(self.key)
            ) as answer:
                identity = answer.headers["x-request-id"]
                if answer.status != 200:
                    return Seen(model, prompt, identity, (), "refused")
                async for line in answer.content:
                    if line.startswith(b'data: {"error"'):
                        ended = "failed"
                    elif line.startswith(b"data: {"):
                        for choice in json.loads(line[6:])["choices"]:
                            told = choice["logprobs"] or {
                                "tokens": [choice["text"]],
                                "top_logprobs": [],
                            }
                            words += told["tokens"]
                            gaps += [_gap(likeliest) for likeliest in told["top_logprobs"]]
                            self.delivered += len(told["tokens"])
                    elif line.startswith(b"data: [DONE]"):
                        ended = "whole"
        return Seen(model, prompt, identity, tuple(words), ended, tuple(gaps))

    async def _answered(self, client: aiohttp.ClientSession) -> None:
        """Return once every model is answered."""
        deadline = time.monotonic() + self.kind.start_seconds
        for model in self.models:
            body = {"model": model, "prompt": "x", "max_tokens": 1}
            while True:
                with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                    async with client.post(
                        f"{self.url}/v1/completions", json=body, headers=_bearer(self.probe_key)
                    ) as a:
                        if a.status == 200:
                            break
                assert time.monotonic() < deadline, "no answer came any more"
                await asyncio.sleep(0.05)

    def _compared(self, seen: Seen) -> Literal["right", "undecided", "wrong"]:
        """How what a caller had compares with the undisturbed answer."""
        tokens = self.kind.tokens
        if len(seen.words) > tokens or (seen.ended == "whole" and len(seen.words) < tokens):
            return "wrong"
        right = self.reference.get((seen.model, seen.prompt), seen)
        pairs = enumerate(zip(seen.words, right.words, strict=False))
        place = next((place for place, (word, wanted) in pairs if word != wanted), None)
        if place is None:
            return "right"
        return "undecided" if right.gaps and right.gaps[place] < _TIE else "wrong"

    async def _miscounted(self, seen: list[Seen], known: set[str]) -> list[str]:
        faults = []
        answered = {each.request_id: each for each in seen if each.request_id is not None}
        deadline = time.monotonic() + 10
        while (waiting := await self._admitted()) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if waiting:
            faults.append(f"{waiting} requests are open for ever")
        rows = {row.request_id: row for row in await self._rows() if row.request_id not in known}
        # Who is refused may not have been admitted, where it is the database that cannot say who asks.
        begun = {identity for identity, each in answered.items() if each.ended != "refused"}
        faults += [f"{lost}: not counted" for lost in begun - rows.keys()]
        for identity, each in answered.items():
            row = rows.get(identity)
            if row is not None and not self._fits(each, row):
                told = f"{row.status} with {row.completion_tokens} tokens"
                faults.append(
                    f"{identity}: {each.ended} after {len(each.words)} tokens, counted as {told}"
                )
        unknown = len(rows) - len(answered.keys() & rows.keys())
        if unknown > sum(each.request_id is None for each in seen):
            faults.append(f"{unknown} records of requests that nobody made")
        return faults

    def _fits(self, seen: Seen, row: Usage) -> bool:
        if seen.ended == "whole":
            return row.status == "completed" and row.completion_tokens == self.kind.tokens
        if seen.ended == "failed":
            return row.status == "failed" and row.completion_tokens == len(seen.words)
        if seen.ended == "refused":
            return row.status == "failed" and row.completion_tokens == 0
        # The gateway died: it may have counted the whole before the caller had its end.
        return row.status == "interrupted" or (
            row.status == "completed" and row.completion_tokens == self.kind.tokens
        )

    async def _orphans(self, client: aiohttp.ClientSession) -> list[str]:
        deadline = time.monotonic() + 5
        while True:
            async with client.get(f"{self.engine_url}/metrics") as answer:
                running = sum(float(found) for found in _RUNNING.findall(await answer.read()))
            if not running:
                return []
            if time.monotonic() > deadline:
                return [f"{running:.0f} requests are at work in the engine for nobody"]
            await self._answered(
                client
            )  # an engine counts with its steps, of which there may be none
            await asyncio.sleep(0.05)

    async def _admitted(self) -> int:
        async with self._reading() as session:
            return int(await session.scalar(select(func.count()).select_from(Admission)) or 0)

    async def _rows(self) -> list[Usage]:
        async with self._reading() as session:
            return list(
                (await session.scalars(select(Usage).where(Usage.key_id == self.key_id))).all()
            )

    async def _usage(self) -> set[str]:
        return {row.request_id for row in await self._rows()}

    @contextlib.asynccontextmanager
    async def _reading(self) -> AsyncIterator[Any]:
        database = Database(self.database)
        try:
            async with database.reading() as session:
                yield session
        finally:
            await database.close()

    def cut_connections(self) -> None:
        """End every connection to the database: PostgreSQL's own are terminated; where there is none, as in SQLite, a process
        dies in the middle of a transaction that holds the lock.
        """
        if self.database.startswith("sqlite"):
            subprocess.run(
                [sys.executable, "-c", _DYING, self.database.removeprefix("sqlite:///")],
                check=False,
            )
        else:
            asyncio.run(self._terminate())

    async def _terminate(self) -> None:
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        async with self._reading() as session:
            await session.execute(
                text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
            )


_DYING = """
import os, signal, sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE tenants SET name = 'never'")
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


@contextlib.contextmanager
def scene(folder: Path, database: str, kind: EngineKind = FAKE) -> Iterator[Scene]:
    """All of it, running, with the answers that are right."""
    port, engine_port = free_port(), free_port()
    url, engine_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{engine_port}"
    settings = {
        "REFT_DATABASE": database, "REFT_STORE": str(folder / "store"), "REFT_ENGINES": engine_url,
        "REFT_GATEWAY_NAME": "killed", "REFT_LOG_LEVEL": "WARNING",
    }  # fmt: skip
    admin = asyncio.run(first_key(database))
    with contextlib.ExitStack() as stack:
        engine = Kept(kind.command(engine_port), kind.settings, folder / "engine.log")
        stack.callback(engine.stop)
        command = [sys.executable, "-m", "reft_serve.cli.gateway", "--port", str(port)]
        gateway = Kept(command, settings, folder / "gateway.log")
        stack.callback(gateway.stop)
        with httpx.Client(
            base_url=url, headers=_bearer(admin), timeout=30, trust_env=False
        ) as http:
            _wait(http, folder, kind.start_seconds)
            files = [("files", item) for item in kind.adapter().items()]
            http.post("/v1/adapters", data={"name": "birds"}, files=files).raise_for_status()
            storm, probe = (
                http.post("/v1/keys", json={}).raise_for_status().json() for _ in range(2)
            )
        yield Scene(
            folder, database, url, engine_url, engine, gateway, kind, storm["secret"], storm["id"],
            probe["secret"],
        )  # fmt: skip


def _wait(http: httpx.Client, folder: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if http.get("/health/ready").status_code == 200:
                return
        logs = (folder / "gateway.log", folder / "engine.log")
        assert time.monotonic() < deadline, "".join(log.read_text()[-4000:] for log in logs)
        time.sleep(0.05)


def _gap(likeliest: dict[str, float]) -> float:
    best, second, *_ = (
        *sorted(likeliest.values(), reverse=True),
        -math.inf,
    )  # two tokens may have one text
    return best - second


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
