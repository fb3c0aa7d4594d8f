"""A process that is started again whenever it ends, and that ends with its supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import typer

from reft_serve.parent import end_with_parent

__all__ = ["SupervisedProcess", "say"]

_STEADY_SECONDS = 60.0
_LONGEST_PAUSE = 30.0


@dataclass(eq=False)
class SupervisedProcess:
    """A process that is restarted, with exponential backoff, whenever it exits.

    Its output is appended to `log`, or goes where this process writes. `ended` is told its name,
    its exit code and the seconds until it starts again.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    socket: Path | None = None
    log: Path | None = None
    ended: Callable[[str, int, float], None] | None = None
    process: asyncio.subprocess.Process | None = field(default=None, init=False)
    stopping: bool = field(default=False, init=False)

    async def keep(self) -> None:
        """Run and restart the process until `stop`."""
        pause = 1.0
        while not self.stopping:
            begun = time.monotonic()
            # a killed process leaves it, and the next one could not bind
            if self.socket is not None:
                self.socket.unlink(missing_ok=True)
            # Its own process group: Ctrl-C reaches only `up`, which ends the children in order. Not
            # its own session: Linux divides cores by session (sched_autogroup), and the polling
            # engine kept the gateway off a core for 0.1 s and more at a time.
            with _appended(self.log) as output:
                self.process = await asyncio.create_subprocess_exec(
                    *self.command,
                    env=self.environment,
                    process_group=0,
                    preexec_fn=partial(end_with_parent, signal.SIGTERM),
                    stdout=output,
                    stderr=output,
                )
            code = await self.process.wait()
            if self.stopping:
                return
            self._sweep()
            pause = (
                1.0
                if time.monotonic() - begun > _STEADY_SECONDS
                else min(2 * pause, _LONGEST_PAUSE)
            )
            (self.ended or _say_ended)(self.name, code, pause)
            await asyncio.sleep(pause)

    async def stop(self, patience: float) -> None:
        """Terminate the process; kill it after `patience` seconds."""
        self.stopping = True
        process = self.process
        if process is None:
            return
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), patience)
        self._sweep()

    def kill(self) -> None:
        """End it now."""
        self.stopping = True
        self._sweep()

    def _sweep(self) -> None:
        """Kill processes that an ended process left in its group."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def _say_ended(name: str, code: int, pause: float) -> None:
    say(f"{name} ended with code {code}; restarting it in {pause:.0f} s")


@contextlib.contextmanager
def _appended(log: Path | None) -> Iterator[int | None]:
    """A file descriptor at the end of a log; None to write where this process writes."""
    if log is None:
        yield None
        return
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def say(sentence: str) -> None:
    """Print a sentence of `up` on standard error."""
    typer.echo(f"reft-serve: {sentence}", err=True)
