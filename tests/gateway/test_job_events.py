"""A job's events over HTTP: listed by pages, and followed as they come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest
from openai import Stream
from openai.types.fine_tuning import FineTuningJobEvent
from sqlalchemy import event

from tests.support.gateway.fake_worker import FakeWorker
from tests.support.gateway.harness import Gateway, Tenant, running, take
from tests.support.gateway.uploads import create
from tests.support.waiting import wait_for


def test_events_are_listed_by_pages_and_followed_as_they_come(
    worker: FakeWorker, tenant: Tenant
) -> None:
    job = create(tenant)
    client, mine = tenant.openai, worker.claim()
    seen: list[FineTuningJobEvent] = []
    path = f"/fine_tuning/jobs/{job.id}/events"

    def stream(**query: str) -> Stream[FineTuningJobEvent]:
        options: Any = {"params": {"stream": "true", **query}}
        return client.get(
            path,
            cast_to=object,
            stream=True,
            stream_cls=Stream[FineTuningJobEvent],
            options=options,
        )

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
    assert [each.id for each in listed] == [each.id for each in seen][::-1]
    assert [(e.type, e.message, e.data) for e in seen[3:5]] == [
        ("metrics", "Step 1", {"step": 1, "train_loss": 1.0}), ("metrics", "Step 2", {"step": 2, "train_loss": 0.5}),
    ]  # fmt: skip
    assert seen[-1].message == "The job has successfully completed"
    again = list(stream(after=seen[3].id))
    assert [each.id for each in again] == [each.id for each in seen[4:]]
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
            held = answer.iter_lines()
            next(held)
            assert len(services.followers) == 1
        wait_for(lambda: len(services.followers) == 0)
        begun = time.monotonic()
        with tenant.http.stream("GET", url, params={"stream": "true"}) as answer:
            lines = answer.iter_lines()
            next(lines)
            services.drain()
            assert "data: [DONE]" not in list(lines)
        assert time.monotonic() - begun < 5
        assert isinstance(answer, httpx.Response)


def stream_of(tenant: Tenant, job_id: str) -> Any:
    return tenant.http.stream(
        "GET", f"/v1/fine_tuning/jobs/{job_id}/events", params={"stream": "true"}
    )


def test_streams_are_bounded_for_each_tenant(
    worker: FakeWorker, make_tenant: Callable[..., Tenant]
) -> None:
    few, other = make_tenant(limits={"event_streams": 3}), make_tenant()
    job, theirs = create(few), create(other)
    with ExitStack() as stack:
        held = [stack.enter_context(stream_of(few, job.id)) for _ in range(4)]
        assert [answer.status_code for answer in held] == [200, 200, 200, 429]
        assert stack.enter_context(stream_of(other, theirs.id)).status_code == 200
    wait_for(lambda: _is_free(few, job.id))


def _is_free(tenant: Tenant, job_id: str) -> bool:
    with stream_of(tenant, job_id) as answer:
        return bool(answer.status_code == 200)


@pytest.mark.parametrize("how", ["revoked", "disabled"])
def test_a_stream_ends_with_its_key(
    gateway: Gateway, worker: FakeWorker, make_tenant: Callable[..., Tenant], how: str
) -> None:
    tenant = make_tenant()
    job = create(tenant)
    made = tenant.http.post("/v1/keys", json={"role": "owner"}).json()
    with gateway.http(made["secret"]).stream(
        "GET", f"/v1/fine_tuning/jobs/{job.id}/events", params={"stream": "true"}
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        begun = time.monotonic()
        if how == "revoked":
            tenant.http.delete(f"/v1/keys/{made['id']}").raise_for_status()
        else:
            gateway.admin.patch(
                f"/v1/admin/tenants/{tenant.id}", json={"disabled": True}
            ).raise_for_status()
        rest = list(lines)
    assert time.monotonic() - begun < 5
    assert "invalid_api_key" in "".join(rest)
    assert "[DONE]" not in "".join(rest)


def test_one_look_serves_all_streams(
    worker: FakeWorker, make_tenant: Callable[..., Tenant], gateway: Gateway
) -> None:
    tenants = [make_tenant() for _ in range(3)]
    statements: list[str] = []
    held: list[Any] = []
    engine = gateway.served.app.state.services.database.engine.sync_engine
    with ExitStack() as stack:
        for tenant in tenants:
            job = create(tenant)
            for _ in range(5):
                held.append(stack.enter_context(stream_of(tenant, job.id)).iter_lines())
                next(held[-1])
        time.sleep(1)
        event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
        time.sleep(2.2)
        looks = [statement for statement in statements if "job_events" in statement]
    assert 3 <= len(looks) <= 5
