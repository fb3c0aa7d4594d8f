"""What a gateway does from time to time."""

from __future__ import annotations

from pathlib import Path

from reft_serve.database.jobs import queue
from tests.support.gateway.fake_worker import FakeWorker
from tests.support.gateway.harness import running
from tests.support.gateway.uploads import create
from tests.support.waiting import wait_for


def test_a_job_that_loses_its_workers_has_as_many_attempts_as_the_settings_say(
    tmp_path: Path,
) -> None:
    with running(tmp_path, upkeep_seconds=0.05, train_attempts=5) as (gateway, _):
        tenant, worker = gateway.tenant("one"), FakeWorker(gateway.settings)
        job = create(tenant)

        def status() -> str:
            return tenant.openai.fine_tuning.jobs.retrieve(job.id).status

        for attempt in range(1, 6):
            claim = worker.act(
                lambda session: queue.claim(session, "dying", 0.001, most_attempts=5)
            )
            assert claim is not None
            assert claim.attempts == attempt
            wait_for(lambda: status() != "running")
            assert status() == ("queued" if attempt < 5 else "failed")
        error = tenant.openai.fine_tuning.jobs.retrieve(job.id).error
        assert error is not None
        assert (error.code, "after 5 attempts" in error.message) == ("too_many_attempts", True)
