"""The process of one job, as its worker holds it: started from a warm one, heard, stopped. No torch
in this process.

A server process imports torch and transformers once and forks for each job, so a job begins in a
fraction of a second. It starts with the first job, so a worker without work is small.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import AsyncIterator
from multiprocessing.context import ForkServerProcess
from typing import Any

from pydantic import ValidationError

from reft_serve.config import set_environment
from reft_serve.errors import ServiceError
from reft_serve.training.jobs.messages import STOP, JobSpec, Message, read_message

__all__ = ["JobProcess", "JobProcesses"]

_LONGEST_LINE = 16 << 20


class JobProcesses:
    """Where jobs' processes come from."""

    def __init__(self) -> None:
        # Else to ask for GPUs before a fork would leave the forked process without them.
        set_environment({"PYTORCH_NVML_BASED_CUDA_CHECK": "1"})
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["__main__", "reft_serve.training.jobs.job_main"])
        self._starting = asyncio.Lock()
        self._devices: list[tuple[str, int]] | None = None

    async def devices(self) -> list[tuple[str, int]]:
        """The GPUs of this machine, by number, with their memory in bytes. When it returns, jobs
        start quickly.

        Raises:
            ServiceError: nothing can be trained here.
        """
        if self._devices is None:
            ours, theirs = socket.socketpair()
            process = await self._start(_send_devices, theirs)
            with ours:
                ours.settimeout(0.0)
                answer = await asyncio.get_running_loop().sock_recv(ours, 1 << 16)
            await asyncio.to_thread(process.join)
            if not answer:
                raise ServiceError(
                    "training is not available here, see the log; pip install 'reft-serve[train]'"
                )
            self._devices = [(str(name), int(size)) for name, size in json.loads(answer)]
        return self._devices

    async def start(self, spec: JobSpec) -> JobProcess:
        ours, theirs = socket.socketpair()
        process = await self._start(_enter, theirs, spec.model_dump_json())
        reader, writer = await asyncio.open_connection(sock=ours, limit=_LONGEST_LINE)
        return JobProcess(process, reader, writer)

    async def _start(self, target: Any, theirs: socket.socket, *given: str) -> ForkServerProcess:
        process = self._context.Process(target=target, args=(*given, theirs), daemon=True)
        async with self._starting:  # multiprocessing's own tables are not made for several threads
            with theirs:
                await asyncio.to_thread(process.start)
        return process


class JobProcess:
    """One running job."""

    def __init__(
        self, process: ForkServerProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    async def messages(self) -> AsyncIterator[Message]:
        """Messages of the process, until it ends."""
        while line := await self._line():
            try:
                yield read_message(line)
            except ValidationError:  # cut off by its end
                return

    async def _line(self) -> bytes:
        try:
            return await self._reader.readline()
        except (ConnectionError, ValueError):
            return b""

    def stop(self) -> None:
        """Ask the process to store a checkpoint after its current step and to end."""
        if not self._writer.is_closing():
            self._writer.write(STOP)

    def kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()

    async def wait(self) -> int | None:
        """Its exit code, once it has ended; negative where a signal ended it."""
        self._writer.close()
        await asyncio.to_thread(self._process.join)
        return self._process.exitcode


def _enter(spec: str, sock: socket.socket) -> None:
    from reft_serve.training.jobs.job_main import train_job

    # Ctrl-C is the worker's, which stops its jobs in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    read = JobSpec.model_validate_json(spec)
    os.chdir(read.folder)  # files that libraries write are removed with the job's folder
    if read.device != "cpu":
        set_environment({"CUDA_VISIBLE_DEVICES": read.device})
    train_job(read, sock)


def _send_devices(sock: socket.socket) -> None:
    import torch

    import reft_serve.training.jobs.job_main  # noqa: F401 - that it can be

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [(str(k), torch.cuda.get_device_properties(k).total_memory) for k in range(count)]
    sock.sendall(json.dumps(devices).encode())
