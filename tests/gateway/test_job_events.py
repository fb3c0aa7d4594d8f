"""A job's events over HTTP: listed by pages, and followed as they come."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import openai
import pytest
from openai import Stream
from openai.types.fine_tuning import FineTuningJobEvent

from tests.gateway.fake_worker import FakeWorker
from tests.gateway.harness import Tenant, running
from tests.gateway.test_fine_tuning import create
from tests.gateway.test_inference import take, wait_for


def test_events_are_listed_by_pages_and_followed_as_they_come(worker: FakeWorker, tenant: Tenant) -> None:
    job = create(tenant)
    client, mine = tenant.openai, worker.claim()
    seen: list[FineTuningJobEvent] = []
    path = f"/fine_tuning/jobs/{job.id}/events"

    def stream(**query: str) -> Stream[FineTuningJobEvent]:
        options = {"params": {"stream": "true", **query}}
        return client.get(path, cast_to=object, stream=True, stream_cls=Stream[FineTuningJobEvent], options=options)  # type: ignore[arg-type, return-value]

    following = threading.Thread(target=take, args=(stream(), seen))
    following.start()
    wait_for(lambda: len(seen) == 3)
    for k in range(1, 4):
        worker.tell(mine, f"Step {k}", {"step": k, "train_loss": 1 / k})
    wait_for(lambda: len(seen) == 6)
    worker.succeed(mine)
    following.join(10)
    assert not following.is_alive()
    listed = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert [event.id for event in listed] == [event.id for event in seen][::-1]
    assert [(e.type, e.message, e.data) for e in seen[3:5]] == [
        ("metrics", "Step 1", {"step": 1, "train_loss": 1.0}), ("metrics", "Step 2", {"step": 2, "train_loss": 0.5}),
    ]  # fmt: skip
    assert seen[-1].message == "The job has successfully completed"
    again = list(stream(after=seen[3].id))
    assert [event.id for event in again] == [event.id for event in seen[4:]]
    assert client.fine_tuning.jobs.list_events(job.id, limit=1).has_more
    for after in ("ftevent-0", seen[0].id.upper()):
        with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
            stream(after=after)


def test_a_stream_ends_when_its_reader_leaves_or_the_gateway_does(tmp_path: Any) -> None:
    with running(tmp_path) as (gateway, _):
        tenant = gateway.tenant("acme")
        job = create(tenant)
        services = gateway.served.app.state.services
        url = f"/v1/fine_tuning/jobs/{job.id}/events"
        with tenant.http.stream("GET", url, params={"stream": "true"}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            next(answer.iter_lines())
            assert services.followers == 1
        wait_for(lambda: services.followers == 0)
        begun = time.monotonic()
        with tenant.http.stream("GET", url, params={"stream": "true"}) as answer:
            lines = answer.iter_lines()
            next(lines)
            services.draining = True
            assert "data: [DONE]" not in list(lines)
        assert time.monotonic() - begun < 5
        assert isinstance(answer, httpx.Response)
