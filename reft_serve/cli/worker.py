"""`reft-serve worker`: run the fine-tuning jobs of the gateways that share its database and
stores.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from reft_serve.config import TrainerSettings

__all__ = ["worker"]

_Host = Annotated[str, typer.Option(help="Address to listen on, for probes and metrics.")]
_Port = Annotated[
    int | None,
    typer.Option(min=0, max=65535, help="Port of /health/live, /health/ready and /metrics. [none]"),
]


def worker(host: _Host = "127.0.0.1", port: _Port = None) -> None:
    """Run fine-tuning jobs from the database in REFT_DATABASE on the base model in REFT_MODEL."""
    from reft_serve.config import TrainerSettings, read_settings
    from reft_serve.observability import configure_logging

    os.umask(0o077)  # what it writes holds tenants' data
    settings = read_settings(TrainerSettings)
    configure_logging(settings.log_level)
    asyncio.run(_work(settings, host, port))


async def _work(settings: TrainerSettings, host: str, port: int | None) -> None:
    from reft_serve.training.jobs.health import server
    from reft_serve.training.jobs.worker import running

    async with running(settings) as working:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, working.end)
        listening = None if port is None else server(working, host, port)
        serving = None if listening is None else asyncio.create_task(listening.serve())
        try:
            await working.run()
        finally:
            if listening is not None and serving is not None:
                listening.should_exit = True
                with contextlib.suppress(asyncio.CancelledError):
                    await serving


if __name__ == "__main__":
    typer.run(worker)
