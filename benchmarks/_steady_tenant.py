"""A well-behaved tenant as a process: streams with an adapter at random moments, whole answers,
uploads, a few jobs.

Reads a JSON object from its first line of input and stops at the end of the input. Prints one JSON
list of what it did.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import sys
import time
from typing import Any

import aiohttp

__all__ = ["SteadyTenant"]

_TOKENS = 24
_PROMPT = "Once upon a time there was a little"
_ROWS = b'{"prompt": "the cat", "completion": " sat on the mat"}\n' * 8


class SteadyTenant:
    """What it does is noted in `done`: when it began, its kind, the seconds to the first byte and
    in all, its fault.
    """

    def __init__(self, target: dict[str, Any]) -> None:
        self.done: list[dict[str, Any]] = []
        self._target = target
        self._headers = {"authorization": f"Bearer {target['key']}"}
        self._files = {
            name: base64.b64decode(content) for name, content in target["adapter"].items()
        }
        self._number = 0

    async def run(self, ended: asyncio.Event) -> None:
        """Act until `ended`, and wait for what has begun."""
        timeout = aiohttp.ClientTimeout(total=120)
        # Less than the 5 s after which the gateway closes an idle connection: a request could meet
        # the closing.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
        async with aiohttp.ClientSession(
            self._target["url"], headers=self._headers, timeout=timeout, connector=connector
        ) as client:
            rates = self._target["per_minute"]
            acts = {
                "stream": self._stream,
                "completion": self._complete,
                "upload": self._upload,
                "job": self._job,
            }
            async with asyncio.TaskGroup() as group:
                for kind, act in acts.items():
                    group.create_task(self._repeat(client, kind, act, rates[kind], ended))

    async def _repeat(
        self, client: aiohttp.ClientSession, kind: str, act: Any, rate: float, ended: asyncio.Event
    ) -> None:
        rng = random.Random(f"{self._target['seed']} {kind}")
        async with asyncio.TaskGroup() as group:
            while rate and not ended.is_set():
                try:
                    await asyncio.wait_for(ended.wait(), rng.expovariate(rate / 60))
                except TimeoutError:
                    group.create_task(self._noted(client, kind, act))

    async def _noted(self, client: aiohttp.ClientSession, kind: str, act: Any) -> None:
        at, begun, first, fault = time.time(), time.monotonic(), 0.0, ""
        try:
            first = await act(client)
        except (aiohttp.ClientError, TimeoutError, OSError, AssertionError, LookupError) as exc:
            fault = f"{type(exc).__name__}: {exc}"[:500]
        seconds = time.monotonic() - begun
        self.done.append(
            {"at": at, "kind": kind, "first": first, "seconds": round(seconds, 4), "fault": fault}
        )

    async def _stream(self, client: aiohttp.ClientSession) -> float:
        body = {
            "model": "cats",
            "prompt": _PROMPT,
            "max_tokens": _TOKENS,
            "stream": True,
            "ignore_eos": True,
        }
        begun = time.monotonic()
        async with client.post("/v1/completions", json=body) as answer:
            first_bytes = await answer.content.readany()
            first = time.monotonic() - begun
            text = first_bytes + await answer.read()
            assert answer.status == 200, f"{answer.status} {text[:300]!r}"
            assert text.rstrip().endswith(b"[DONE]"), f"cut off: {text[-300:]!r}"
        return first

    async def _complete(self, client: aiohttp.ClientSession) -> float:
        body = {"model": "base", "prompt": _PROMPT, "max_tokens": 8, "temperature": 0}
        await self._sent(client, "POST", "/v1/completions", json=body)
        return 0.0

    async def _upload(self, client: aiohttp.ClientSession) -> float:
        self._number += 1
        name = f"upload-{self._number}"
        form = aiohttp.FormData({"name": name})
        for file, content in self._files.items():
            form.add_field("files", content, filename=file)
        await self._sent(client, "POST", "/v1/adapters", data=form)
        await self._sent(
            client,
            "POST",
            "/v1/completions",
            json={"model": name, "prompt": _PROMPT, "max_tokens": 1},
        )
        await self._sent(client, "DELETE", f"/v1/adapters/{name}")
        return 0.0

    async def _job(self, client: aiohttp.ClientSession) -> float:
        form = aiohttp.FormData({"purpose": "fine-tune"})
        form.add_field("file", _ROWS, filename="rows.jsonl")
        file = await self._sent(client, "POST", "/v1/files", data=form)
        hyperparameters = {"n_epochs": 1}
        body = {"model": "base", "training_file": file["id"]}
        body |= {
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
        }
        job = await self._sent(client, "POST", "/v1/fine_tuning/jobs", json=body)
        path = f"/v1/fine_tuning/jobs/{job['id']}"
        for _ in range(600):
            job = await self._sent(client, "GET", path)
            if job["status"] in ("succeeded", "failed", "cancelled"):
                break
            await asyncio.sleep(0.5)
        assert job["status"] == "succeeded", f"{job['status']} {job.get('error')}"
        return 0.0

    async def _sent(
        self, client: aiohttp.ClientSession, method: str, path: str, **options: Any
    ) -> dict[str, Any]:
        async with client.request(method, path, **options) as answer:
            text = await answer.text()
            assert answer.status < 300, f"{method} {path}: {answer.status} {text[:300]}"
            document: dict[str, Any] = json.loads(text)
            return document


async def _main() -> None:
    tenant, ended = SteadyTenant(json.loads(sys.stdin.readline())), asyncio.Event()

    def wait() -> None:
        sys.stdin.read()

    async def watch() -> None:
        await asyncio.to_thread(wait)
        ended.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        group.create_task(tenant.run(ended))
    print(json.dumps(tenant.done))


if __name__ == "__main__":
    asyncio.run(_main())
