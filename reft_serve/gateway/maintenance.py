"""Periodic maintenance of a gateway: expired files, jobs of lost workers, and the gauges of the
queue.

Every gateway does it; the database lets only one of them have each row.
"""

from __future__ import annotations

import asyncio
import logging
from typing import get_args

from reft_serve.database import webhooks
from reft_serve.database.jobs import fine_tuning, queue
from reft_serve.database.jobs.outcomes import Status
from reft_serve.database.models import DAY_MS, now_ms
from reft_serve.gateway.jobs import data_files
from reft_serve.gateway.services import Services
from reft_serve.observability import JOBS, JOBS_WAITING

__all__ = ["run_forever", "run_once"]

_log = logging.getLogger(__name__)
_DELIVERIES_MS = 7 * DAY_MS


async def run_once(services: Services) -> None:
    """Run every task once."""
    await data_files.sweep(services)
    async with services.database.writing() as session:
        lost = await queue.sweep(session, services.settings.train_attempts)
        await webhooks.forget_deliveries(session, now_ms() - _DELIVERIES_MS)
    if lost:
        _log.warning(
            "jobs of lost workers were requeued or failed", extra={"data": {"count": lost}}
        )
    async with services.database.reading() as session:
        counts = await fine_tuning.count_jobs(session)
    for status in get_args(Status):
        JOBS.labels(status).set(counts.get(status, 0))
    JOBS_WAITING.set(counts.get("queued", 0))


async def run_forever(services: Services) -> None:
    """Do it again and again, until cancelled."""
    try:
        await services.blobs.sweep()
    except Exception:
        _log.exception("the file store could not be cleaned up")
    while True:
        try:
            await run_once(services)
        except Exception:
            _log.exception("maintenance failed; retrying")
        await asyncio.sleep(services.settings.upkeep_seconds)
