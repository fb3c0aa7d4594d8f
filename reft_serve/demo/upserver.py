"""A `reft-serve up` process of our own: started, shown, stopped."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from rich.console import Console

from reft_serve.config import child_environment
from reft_serve.errors import ServiceError

__all__ = ["UpServer", "running_up"]

_READY_SECONDS, _STOP_SECONDS = 300, 60
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
_KEY = re.compile(r"rk-[\w-]{43}")
_SHOWN = re.compile(r"  ok |Ready after")


@dataclass(frozen=True, slots=True)
class UpServer:
    """A running one: its client has the admin's key."""

    client: AsyncOpenAI
    url: str


@asynccontextmanager
async def running_up(
    model: Path, data: Path, flags: Sequence[str], console: Console
) -> AsyncIterator[UpServer]:
    """Run `reft-serve up` on a free loopback port, show the stages of its start, and stop it at the
    end.

    Raises:
        ServiceError: it did not become ready; the message ends with its last lines.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("reft-serve")),
        "up",
        str(model),
        "--data",
        str(data),
    ]
    command += ["--port", str(port), "--plain", *flags]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=child_environment(_OFFLINE),
        process_group=0,
    )
    reading: asyncio.Task[None] | None = None
    try:
        key = await _ready(process, console)
        reading = asyncio.create_task(_drop(process))
        # trust_env=False: a proxy that the environment names is not for loopback.
        http = DefaultAsyncHttpxClient(trust_env=False)
        async with AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=key, http_client=http, timeout=120
        ) as client:
            yield UpServer(client, f"http://127.0.0.1:{port}")
    finally:
        if reading is not None:
            reading.cancel()
        await _stop(process, console)


async def _ready(process: asyncio.subprocess.Process, console: Console) -> str:
    """The key that it shows, once it is ready."""
    assert process.stdout is not None
    key, last, deadline = "", deque[str](maxlen=30), time.monotonic() + _READY_SECONDS
    with console.status("starting reft-serve up"):
        while True:
            try:
                line = await asyncio.wait_for(
                    process.stdout.readline(), deadline - time.monotonic()
                )
            except TimeoutError as exc:
                raise ServiceError(
                    f"`up` was not ready after {_READY_SECONDS} s:\n" + "\n".join(last)
                ) from exc
            text = line.decode(errors="replace").rstrip("\n")
            if match := _KEY.search(text):
                key = match[0]
                continue
            last.append(text)
            if not line or text.startswith("The whole log:"):
                raise ServiceError("`up` could not start:\n" + "\n".join(last))
            if _SHOWN.match(text):
                console.print(text, markup=False, highlight=False)
            if text.startswith("Ready after"):
                return key


async def _drop(process: asyncio.subprocess.Process) -> None:
    """Read what it says further on, so that it never waits for a reader."""
    assert process.stdout is not None
    while await process.stdout.readline():
        pass


async def _stop(process: asyncio.subprocess.Process, console: Console) -> None:
    if process.returncode is not None:
        return
    with console.status("stopping"):
        process.send_signal(signal.SIGINT)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.communicate(), _STOP_SECONDS)
        if process.returncode is None:
            process.kill()
            await process.wait()
