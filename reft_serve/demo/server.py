"""A `reft-serve serve` child process: started, waited for, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

from openai import APIError, AsyncOpenAI, DefaultAsyncHttpxClient

from reft_serve.config import child_environment
from reft_serve.errors import ServiceError

__all__ = ["serving"]

_READY_SECONDS = 300
_STOP_SECONDS = 20
_LOG_LINES = 30
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


@asynccontextmanager
async def serving(arguments: Sequence[str]) -> AsyncIterator[AsyncOpenAI]:
    """Run `reft-serve serve` with these arguments on a free loopback port, and give a client of it.

    Raises:
        ServiceError: it did not become ready; the message ends with the last lines of its log.
    """
    port = _free_port()
    command = [str(Path(sys.executable).with_name("reft-serve")), "serve", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # trust_env=False: a proxy that the environment names is not for loopback.
    http = DefaultAsyncHttpxClient(trust_env=False)
    client = AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", http_client=http, timeout=120
    )
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=child_environment(_QUIET),
            process_group=0,
        )
        try:
            await _ready(process, client.with_options(max_retries=0, timeout=5), log)
            yield client
        finally:
            await client.close()
            _stop(process)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def _ready(process: subprocess.Popen[bytes], client: AsyncOpenAI, log: IO[bytes]) -> None:
    deadline = asyncio.get_running_loop().time() + _READY_SECONDS
    while asyncio.get_running_loop().time() < deadline:
        if process.poll() is not None:
            raise ServiceError(
                f"the server ended with exit code {process.returncode}; its last "
                f"output:\n{_tail(log)}"
            )
        try:
            await client.models.list()
        except APIError:
            await asyncio.sleep(0.5)
        else:
            return
    raise ServiceError(
        f"the server was not ready after {_READY_SECONDS} s; its last output:\n{_tail(log)}"
    )


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-_LOG_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process, then the rest of its group."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
