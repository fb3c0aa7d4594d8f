"""The queue of jobs: whose turn it is, who holds it, and that each ends once, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import select, update

from reft_serve.config import TenantLimits
from reft_serve.database import audit, files, resolution, tenants, webhooks
from reft_serve.database.adapters import list_versions
from reft_serve.database.connection import Database
from reft_serve.database.jobs import claimed, fine_tuning, queue
from reft_serve.database.jobs.outcomes import (
    FINAL,
    Cancelled,
    Failed,
    NewCheckpoint,
    NewVersion,
    Outcome,
    Paused,
    Succeeded,
)
from reft_serve.database.models import (
    Adapter,
    Checkpoint,
    Delivery,
    Event,
    File,
    Job,
    Tenant,
    Version,
    now_ms,
)
from reft_serve.database.room import stored_bytes
from reft_serve.errors import Conflict, LeaseLost, NotFound, RequestInvalid

pytestmark = pytest.mark.anyio

LEASE = 30.0
VERSION = NewVersion("e" * 64, "tiny", 10, {"rank": 2})
DONE = Succeeded(
    VERSION,
    [NewCheckpoint(k, {"train_loss": 1 / k}, NewVersion(str(k) * 64, "tiny", 9)) for k in (2, 1)],
    77,
)


async def make_tenant(database: Database, name: str, **limits: Any) -> Tenant:
    async with database.writing() as session:
        return await tenants.create_tenant(session, name, limits)


async def make_file(database: Database, tenant: Tenant, **options: Any) -> str:
    async with database.writing() as session:
        given = {"filename": "rows.jsonl", "purpose": "fine-tune", "expires_ms": None} | options
        made = await files.start_file(session, tenant.id, "key", **given)
        await files.complete_file(session, files.WrittenFile(made, 5, "f" * 64, "chat", 3))
    return made


async def make_job(database: Database, tenant: Tenant, file_id: str = "", **options: Any) -> str:
    data = file_id or await make_file(database, tenant)
    wanted = fine_tuning.NewJob(
        "base", data, None, {"type": "supervised"}, {"n_epochs": "auto"}, 7, **options
    )
    async with database.writing() as session:
        return (await fine_tuning.create_job(session, tenant, "key", wanted)).id


async def claim(
    database: Database, worker: str = "w", lease: float = LEASE, **options: Any
) -> queue.Claim | None:
    async with database.writing() as session:
        return await queue.claim(session, worker, lease, **options)


async def held(database: Database, **options: Any) -> queue.Claim:
    taken = await claim(database, **options)
    assert taken is not None
    return taken


async def finish(database: Database, held_: queue.Claim, outcome: Outcome) -> str:
    async with database.writing() as session:
        return await claimed.finish(session, held_.id, held_.worker, outcome)


async def beat(database: Database, held_: queue.Claim, step: int = 0) -> str:
    async with database.writing() as session:
        return await claimed.heartbeat(
            session, held_.id, held_.worker, LEASE, claimed.Progress(step, 10, step * 5)
        )


async def ask(database: Database, tenant: Tenant, job_id: str, what: Any) -> Job:
    async with database.writing() as session:
        return await fine_tuning.request_change(session, tenant.id, job_id, what)


async def lose(database: Database, job_id: str) -> None:
    """Let the lease run out, as if its worker had died some time ago."""
    async with database.writing() as session:
        await session.execute(
            update(Job).where(Job.id == job_id).values(lease_until_ms=now_ms() - 1)
        )


async def state(database: Database, job_id: str) -> Job:
    async with database.reading() as session:
        return await fine_tuning.find_job(session, None, job_id)


async def told(database: Database, job_id: str) -> list[str]:
    async with database.reading() as session:
        return [event.message for event in await fine_tuning.events_since(session, job_id, 0)]


async def test_a_job_is_claimed_kept_and_published_in_one_go(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    async with database.writing() as session:
        await webhooks.add_webhook(
            session, tenant.id, "all", "https://x.example/", webhooks.EVENT_TYPES
        )
        await webhooks.add_webhook(
            session, tenant.id, "bad news", "https://x.example/", ["fine_tuning.job.failed"]
        )
    job_id = await make_job(database, tenant, suffix="birds", metadata_={"a": "b"})
    mine = await held(database)
    assert (mine.id, mine.tenant, mine.adapter, mine.attempts, mine.metadata) == (
        job_id,
        "acme",
        "birds",
        1,
        {"a": "b"},
    )
    assert await claim(database) is None
    async with database.writing() as session:
        await claimed.resolve(
            session, mine.id, mine.worker, {"n_epochs": 3}, steps=10, memory_bytes=1000
        )
        await claimed.add_event(
            session, mine.id, mine.worker, "Step 1/10", metrics={"step": 1, "train_loss": 2.0}
        )
        await claimed.add_checkpoint(session, mine.id, mine.worker, 1, {"train_loss": 9.0})
        result = await files.start_file(
            session,
            tenant.id,
            "key",
            filename="r.csv",
            purpose="fine-tune-results",
            expires_ms=None,
        )
    assert await beat(database, mine, 5) == "none"
    async with database.reading() as session:
        assert await fine_tuning.list_checkpoints(session, job_id) == ([], False)
    done = Succeeded(DONE.version, DONE.checkpoints, 77, files.WrittenFile(result, 3, "a" * 64))
    assert await finish(database, mine, done) == "succeeded"

    job = await state(database, job_id)
    name = f"ft:base:acme:birds:{job_id[-8:]}"
    assert (job.status, job.fine_tuned_model, job.trained_tokens, job.step, job.resolved) == (
        "succeeded", name, 77, 10, {"n_epochs": 3},
    )  # fmt: skip
    assert (job.worker, job.lease_until_ms, job.error, job.wanted) == (None, None, None, "none")
    async with database.reading() as session:
        listed, more = await fine_tuning.list_checkpoints(session, job_id, limit=1)
        assert (listed[0].step, listed[0].metrics, more) == (2, {"train_loss": 0.5}, True)
        listed, more = await fine_tuning.list_checkpoints(session, job_id, after=listed[0].id)
        assert ([c.version and c.version.model_id for c in listed], more) == (
            [f"{name}:ckpt-step-1"],
            False,
        )
        route = await resolution.resolve(session, tenant.id, "birds")
        assert route is not None
        assert route.draw(0).digest == VERSION.digest
        assert (await files.find_file(session, tenant.id, result)).purpose == "fine-tune-results"
        deliveries = (await session.scalars(select(Delivery))).all()
        assert [json.loads(each.body)["data"] for each in deliveries] == [{"id": job_id}]
        entries = await audit.list_audit(session, tenant.id)
        assert [(entry.action, entry.details) for entry in entries] == [
            ("job.succeeded", {"model": name})
        ]
    assert (await told(database, job_id))[2:] == [
        "Fine-tuning job started", "Step 1/10", "Checkpoint saved at step 1", f"New fine-tuned model created: {name}",
        "The job has successfully completed",
    ]  # fmt: skip


async def test_nobody_but_the_holder_changes_a_job(database: Database) -> None:
    job_id = await make_job(database, await make_tenant(database, "acme"))
    first = await held(database, worker="same")
    await lose(database, job_id)
    second = await held(database, worker="same")
    assert (second.id, second.attempts) == (job_id, 2)
    assert second.worker != first.worker
    for outcome in (DONE, Cancelled(), Paused(), Failed("x", "y")):
        with pytest.raises(LeaseLost):
            await finish(database, first, outcome)
    async with database.writing() as session:
        for act in (
            claimed.heartbeat(session, job_id, first.worker, LEASE),
            claimed.release(session, job_id, first.worker),
            claimed.resolve(session, job_id, first.worker, {}),
            claimed.add_event(session, job_id, first.worker, "late"),
            claimed.add_checkpoint(session, job_id, first.worker, 1, {}),
        ):
            with pytest.raises(LeaseLost):
                await act
    assert await finish(database, second, DONE) == "succeeded"
    with pytest.raises(LeaseLost):
        await finish(database, second, DONE)
    assert "late" not in await told(database, job_id)


async def test_a_lease_that_ran_out_is_kept_as_long_as_nobody_has_taken_the_job(
    database: Database,
) -> None:
    job_id = await make_job(database, await make_tenant(database, "acme"))
    mine = await held(database)
    await lose(database, job_id)
    assert await beat(database, mine) == "none"
    assert await claim(database) is None


async def test_turns_go_by_priority_then_to_who_has_least_then_by_age(database: Database) -> None:
    one, two = [await make_tenant(database, name) for name in ("one", "two")]
    ones = [await make_job(database, one) for _ in range(3)]
    twos = [await make_job(database, two) for _ in range(2)]
    urgent = await make_job(database, one, priority=5)
    order = [(await held(database)).id for _ in range(6)]
    assert order == [urgent, twos[0], ones[0], twos[1], ones[1], ones[2]]


async def test_limits_of_tenants_and_of_memory_hold_a_job_back(database: Database) -> None:
    few, many, off = (
        await make_tenant(database, "few", running_jobs=1),
        await make_tenant(database, "many"),
        await make_tenant(database, "off"),
    )
    for tenant in (few, few, many, many, off):
        await make_job(database, tenant)
    async with database.writing() as session:
        (await tenants.find_tenant(session, "off")).disabled_ms = now_ms()
    taken = [await claim(database, running_per_tenant=2) for _ in range(4)]
    assert [each and each.tenant for each in taken] == ["few", "many", "many", None]
    big = taken[1]
    assert big is not None
    async with database.writing() as session:
        assert await claimed.release(session, big.id, big.worker, memory_bytes=500) == "queued"
    assert await claim(database, memory_bytes=499) is None
    again = await held(database, memory_bytes=500)
    assert (again.id, again.attempts) == (big.id, 1), "to hand a job back is no failed attempt"


async def test_a_job_that_fails_each_time_is_given_up_and_its_reason_kept_for_the_operator(
    database: Database,
) -> None:
    job_id = await make_job(database, await make_tenant(database, "acme"))
    for attempt in (1, 2, 3):
        mine = await held(database)
        assert mine.attempts == attempt
        async with database.writing() as session:
            status = await claimed.release(
                session, job_id, mine.worker, traceback=f"Traceback {attempt}"
            )
        assert status == ("queued" if attempt < 3 else "failed")
    job = await state(database, job_id)
    assert job.error is not None
    assert (job.error["code"], job.traceback) == ("too_many_attempts", "Traceback 3")
    assert "Traceback" not in json.dumps(await told(database, job_id)) + job.error["message"]
    assert await claim(database) is None


async def test_a_job_whose_workers_die_is_given_up_unless_it_gets_farther(
    database: Database,
) -> None:
    job_id = await make_job(database, await make_tenant(database, "acme"))
    for step in (0, 0, 4, 4, 4):
        mine = await held(database)
        await beat(database, mine, step)
        await lose(database, job_id)
    assert await claim(database) is None
    job = await state(database, job_id)
    assert (job.status, job.error and job.error["code"], job.step) == (
        "failed",
        "too_many_attempts",
        4,
    )


async def test_what_does_not_run_stops_at_once(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    job_id = await make_job(database, tenant)
    assert (await ask(database, tenant, job_id, "pause")).status == "paused"
    assert await claim(database) is None
    with pytest.raises(NotFound):
        await ask(database, await make_tenant(database, "other"), job_id, "cancel")
    assert (await ask(database, tenant, job_id, "resume")).status == "queued"
    with pytest.raises(Conflict, match="is queued, not paused"):
        await ask(database, tenant, job_id, "resume")
    await ask(database, tenant, job_id, "pause")
    assert (await ask(database, tenant, job_id, "cancel")).status == "cancelled"
    for what in ("cancel", "pause", "resume"):
        with pytest.raises(Conflict, match="has cancelled already"):
            await ask(database, tenant, job_id, what)


async def test_a_worker_is_told_to_pause_and_the_job_goes_on_later(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    job_id = await make_job(database, tenant)
    mine = await held(database)
    assert (await ask(database, tenant, job_id, "pause")).status == "running"
    assert await beat(database, mine, 3) == "pause"
    await ask(database, tenant, job_id, "resume")
    assert await beat(database, mine, 3) == "none"
    await ask(database, tenant, job_id, "pause")
    assert await finish(database, mine, Paused()) == "paused"
    await ask(database, tenant, job_id, "resume")
    again = await held(database)
    assert (again.attempts, again.step) == (1, 3)


async def test_a_cancel_wins_over_a_success_that_comes_after_it(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    job_id = await make_job(database, tenant)
    mine = await held(database)
    await ask(database, tenant, job_id, "cancel")
    with pytest.raises(Conflict, match="being cancelled"):
        await ask(database, tenant, job_id, "pause")
    assert await beat(database, mine) == "cancel"
    assert await finish(database, mine, DONE) == "cancelled"
    async with database.reading() as session:
        assert await session.scalar(select(Adapter)) is None
        assert await session.scalar(select(Checkpoint)) is None


@pytest.mark.parametrize(("what", "status"), [("cancel", "cancelled"), ("pause", "paused")])
async def test_what_a_dead_worker_was_told_happens_without_it(
    database: Database, what: str, status: str
) -> None:
    tenant = await make_tenant(database, "acme")
    job_id = await make_job(database, tenant)
    await held(database)
    await ask(database, tenant, job_id, what)
    await lose(database, job_id)
    async with database.writing() as session:
        assert await queue.sweep(session) == 1
    assert (await state(database, job_id)).status == status


async def test_a_success_that_cannot_be_recorded_whole_leaves_nothing(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    job_id = await make_job(database, tenant)
    mine = await held(database)
    lost = Succeeded(
        DONE.version, DONE.checkpoints, 1, files.WrittenFile("file-absent", 3, "a" * 64)
    )
    with pytest.raises(Conflict, match="upload the file again"):
        await finish(database, mine, lost)
    assert (await state(database, job_id)).status == "running"
    async with database.reading() as session:
        assert await session.scalar(select(Adapter)) is None
    assert await finish(database, mine, DONE) == "succeeded"


async def test_a_second_job_of_the_same_suffix_makes_the_next_versions(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    for _ in range(2):
        await make_job(database, tenant, suffix="birds")
        await finish(database, await held(database), DONE)
    async with database.reading() as session:
        adapter = await session.scalar(select(Adapter))
        assert adapter is not None
        versions = await list_versions(session, adapter.id)
    assert [version.number for version in versions] == [6, 5, 4, 3, 2, 1]
    assert len({version.model_id for version in versions}) == 6


@pytest.mark.parametrize("suffix", ["../etc", "-x", "ö", "a b", "x" * 64])
async def test_a_suffix_that_names_nothing_is_refused(database: Database, suffix: str) -> None:
    tenant = await make_tenant(database, "acme")
    with pytest.raises(RequestInvalid) as caught:
        await make_job(database, tenant, suffix=suffix)
    assert caught.value.param == "suffix"


async def test_jobs_are_listed_by_pages_and_by_metadata(database: Database) -> None:
    tenant, other = [await make_tenant(database, name) for name in ("acme", "other")]
    await make_job(database, other, metadata_={"team": "blue"})
    odd = {'$."; --': "x'\"", "team": "blue"}
    mine = [
        await make_job(database, tenant, metadata_=given)
        for given in ({}, {"team": "blue"}, {"team": ""}, odd)
    ]
    async with database.reading() as session:
        page, more = await fine_tuning.list_jobs(session, tenant.id, limit=3)
        assert more
        rest, more = await fine_tuning.list_jobs(session, tenant.id, after=page[-1].id, limit=3)
        assert not more
        assert sorted(job.id for job in [*page, *rest]) == sorted(mine)
        for wanted, expected in (
            ({"team": "blue"}, [1, 3]),
            ({"team": ""}, [2]),
            ({}, [0]),
            (odd, [3]),
            ({"no": "x"}, []),
        ):
            found, _ = await fine_tuning.list_jobs(session, tenant.id, metadata=wanted)
            assert {job.id for job in found} == {mine[k] for k in expected}, wanted
        assert len((await fine_tuning.list_jobs(session, None))[0]) == 5
        with pytest.raises(NotFound):
            await fine_tuning.list_jobs(session, other.id, after=mine[0])
        assert await fine_tuning.unfinished_jobs_of(session, tenant.id) == 4
        assert await fine_tuning.count_jobs(session) == {"queued": 5}


async def test_events_are_listed_newest_first_and_followed_oldest_first(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    job_id = await make_job(database, tenant)
    mine = await held(database)
    async with database.writing() as session:
        for k in range(5):
            await claimed.add_event(session, job_id, mine.worker, f"event {k}")
    async with database.reading() as session:
        page, more = await fine_tuning.list_events(session, job_id, limit=2)
        assert ([event.message for event in page], more) == (["event 4", "event 3"], True)
        page, more = await fine_tuning.list_events(session, job_id, after=page[-1].id, limit=100)
        assert ([event.message for event in page][:3], more) == (
            ["event 2", "event 1", "event 0"],
            False,
        )
        since = await fine_tuning.events_since(session, job_id, page[0].number)
        assert [event.message for event in since] == ["event 3", "event 4"]
        with pytest.raises(NotFound):
            await fine_tuning.list_events(session, job_id, after="ftevent-none")


async def test_a_file_that_a_job_needs_is_neither_deleted_nor_expires(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    data = await make_file(database, tenant, expires_ms=now_ms() + 300)
    job_id = await make_job(database, tenant, data)
    async with database.writing() as session:
        with pytest.raises(Conflict, match=job_id):
            await files.delete_file(session, tenant.id, data)
    await asyncio.sleep(0.4)
    async with database.writing() as session:
        with pytest.raises(NotFound):
            await files.find_file(session, tenant.id, data)
        assert (await files.needed_file(session, data)).sha256 == "f" * 64
        assert list(await files.swept_files(session, 0)) == []
    await ask(database, tenant, job_id, "cancel")
    async with database.writing() as session:
        assert list(await files.swept_files(session, 0)) == [data]
        await files.forget_file(session, data)
        assert await session.scalar(select(File)) is None


async def test_what_was_left_half_way_is_swept_and_what_is_whole_is_not(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    whole, deleted = await make_file(database, tenant), await make_file(database, tenant)
    async with database.writing() as session:
        half = await files.start_file(
            session, tenant.id, None, filename="x", purpose="fine-tune", expires_ms=None
        )
        await files.delete_file(session, tenant.id, deleted)
        assert list(await files.swept_files(session, now_ms() - 60_000)) == [deleted]
    async with database.writing() as session:
        assert set(await files.swept_files(session, now_ms() + 1)) == {half, deleted}
        with pytest.raises(Conflict, match="timed out"):
            await files.complete_file(session, files.WrittenFile(half, 1, "a" * 64))
        await files.forget_file(session, whole)
        listed, more = await files.list_files(session, tenant.id)
        assert ([file.id for file in listed], more) == ([whole], False)
        assert await stored_bytes(session, tenant.id) == 5


async def test_a_result_is_held_to_the_tenants_limits(database: Database) -> None:
    # A data file has 5 bytes, the result 10, each of its two checkpoints 9.
    ends = {5 + 10 + 18: 3, 5 + 10 + 17: 2, 5 + 10: 1, 5 + 9: 0}
    for room, versions in ends.items():
        tenant = await make_tenant(database, f"t{room}", storage_bytes=room)
        job_id = await make_job(database, tenant)
        mine = await held(database)
        status = await finish(database, mine, DONE)
        assert status == ("succeeded" if versions else "failed")
        async with database.reading() as session:
            assert await stored_bytes(session, tenant.id) <= room
            kept = [version.source for version in (await session.scalars(select(Version))).all()]
            steps = [each.step for each in (await fine_tuning.list_checkpoints(session, job_id))[0]]
        assert kept.count(job_id) == versions
        assert steps == [2, 1][: max(0, versions - 1)]
        job, events = await state(database, job_id), await told(database, job_id)
        if not versions:
            assert (job.error or {})["code"] == "limit_reached"
            assert "14 bytes of storage is used up" in (job.error or {})["message"]
        elif versions < 3:
            assert any(
                f"{3 - versions} of 2 checkpoints were not published" in message
                for message in events
            )


async def test_results_that_end_at_once_see_one_another(database: Database) -> None:
    tenant = await make_tenant(database, "acme", adapters=2)
    data = await make_file(database, tenant)
    for _ in range(5):
        await make_job(database, tenant, data)
    mine = [await held(database) for _ in range(5)]
    ends = await asyncio.gather(
        *(finish(database, each, Succeeded(VERSION, [], 1)) for each in mine)
    )
    assert sorted(ends) == ["failed"] * 3 + ["succeeded"] * 2
    async with database.reading() as session:
        assert len((await session.scalars(select(Adapter))).all()) == 2


async def test_a_checkpoint_warns_that_the_result_will_not_fit(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    job_id = await make_job(database, tenant)
    mine = await held(database)
    for limits in (TenantLimits(storage_bytes=100), TenantLimits(storage_bytes=5)):
        async with database.writing() as session:
            await claimed.add_checkpoint(session, mine.id, mine.worker, 1, {}, limits)
    warned = [
        message for message in await told(database, job_id) if "could not be published" in message
    ]
    assert len(warned) == 1


async def test_a_tenants_files_are_swept_after_it(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    data = await make_file(database, tenant)
    await make_job(database, tenant, data)
    mine = await held(database)
    async with database.writing() as session:
        await tenants.delete_tenant(session, await tenants.find_tenant(session, "acme"))
    with pytest.raises(LeaseLost):
        await beat(database, mine)
    async with database.writing() as session:
        assert list(await files.swept_files(session, 0)) == [data]
        assert await session.scalar(select(Event)) is None


async def test_a_delivery_is_tried_until_it_is_settled_and_by_one_at_a_time(
    database: Database,
) -> None:
    tenant = await make_tenant(database, "acme")
    async with database.writing() as session:
        webhook = await webhooks.add_webhook(
            session, tenant.id, "w", "https://x.example/", webhooks.EVENT_TYPES
        )
        await webhooks.enqueue(session, tenant.id, "fine_tuning.job.failed", {"id": "ftjob-1"})
    async with database.writing() as session:
        (stale,) = await webhooks.claim_deliveries(session, [webhook.id], 0.0)
    await asyncio.sleep(0.01)
    async with database.writing() as session:
        (first,) = await webhooks.claim_deliveries(session, [webhook.id], 60)
        assert await webhooks.claim_deliveries(session, [webhook.id], 60) == []
        assert (first.id, first.body, first.attempts) == (stale.id, stale.body, 2)
        assert webhook.secret not in repr(first)
        await webhooks.settle_delivery(session, stale, "200", delivered=True, again_in_seconds=None)
        await webhooks.settle_delivery(session, first, "500", delivered=False, again_in_seconds=0)
    await asyncio.sleep(0.01)
    async with database.writing() as session:
        (third,) = await webhooks.claim_deliveries(session, [webhook.id], 60)
        await webhooks.settle_delivery(session, third, "200", delivered=True, again_in_seconds=None)
    async with database.writing() as session:
        row = await session.scalar(select(Delivery))
        assert row is not None
        assert (row.status, row.attempts, row.outcome) == ("delivered", 3, "200")
        await webhooks.forget_deliveries(session, now_ms() + 1)
        assert await session.scalar(select(Delivery)) is None


async def test_many_workers_at_once_run_each_job_by_one_holder_to_one_end(
    database: Database,
) -> None:
    """Workers of several processes' pools, which lose leases, hand back, pause and fail as they like."""
    pools = [database, *(Database(database.engine.url.render_as_string(False)) for _ in range(2))]
    owners = [await make_tenant(database, f"t{k}") for k in range(3)]
    data = [await make_file(database, owner) for owner in owners]
    made = [await make_job(database, owners[k % 3], data[k % 3]) for k in range(18)]
    holders: Counter[str] = Counter()
    ends: list[str] = []

    async def work(k: int) -> None:
        dice = random.Random(k)
        pool, idle = pools[k % 3], 0
        while idle < 3:
            mine = await claim(pool, f"w{k}", running_per_tenant=3, most_attempts=1000)
            if mine is None:
                idle += 1
                await asyncio.sleep(0.02)
                continue
            idle, holders[mine.id] = 0, holders[mine.id] + 1
            assert holders[mine.id] == 1, "two hold one job"
            await beat(pool, mine, dice.randrange(9))
            holders[mine.id] -= 1
            fate = dice.random()
            if fate < 0.3:
                await lose(pool, mine.id)
                await asyncio.sleep(0.005)
                with contextlib.suppress(LeaseLost):  # it may be this one's still
                    await finish(pool, mine, DONE)
                    ends.append(mine.id)
            elif fate < 0.5:
                async with pool.writing() as session:
                    await claimed.release(session, mine.id, mine.worker)
            else:
                outcomes: list[Outcome] = [DONE, DONE, Failed("x", "y"), Cancelled()]
                await finish(pool, mine, dice.choice(outcomes))
                ends.append(mine.id)

    await asyncio.gather(*(work(k) for k in range(6)))
    assert Counter(ends) == Counter(made)
    async with database.reading() as session:
        rows = (await session.scalars(select(Job))).all()
        assert {row.status for row in rows} <= FINAL
        finals = [
            event
            for event in (await session.scalars(select(Event))).all()
            if event.message in _FINAL_EVENTS
        ]
        assert Counter(event.job_id for event in finals) == Counter(made)
    for pool in pools[1:]:
        await pool.close()


_FINAL_EVENTS = {"The job has successfully completed", "The job was cancelled", "The job failed: y"}


async def make_way(database: Database, *held_: queue.Claim, **options: Any) -> str | None:
    async with database.writing() as session:
        return await queue.make_way(session, [each.id for each in held_], 1 << 40, **options)


async def test_a_job_gives_way_to_that_of_a_tenant_with_fewer_and_goes_on_after_it(
    database: Database,
) -> None:
    first, second = await make_tenant(database, "first"), await make_tenant(database, "second")
    await make_job(database, first)
    long = await held(database)
    assert await make_way(database, long) is None, "nobody waits"
    await make_job(database, first)
    assert await make_way(database, long) is None, "only its own tenant waits"
    short = await make_job(database, second)
    assert await make_way(database, long, waited_seconds=60.0) is None, (
        "a worker with room may take it"
    )
    assert await make_way(database, long) == long.id
    assert await make_way(database, long) is None, "one is enough"
    async with database.reading() as session:
        assert await claimed.poll(session, long.id, long.worker) == "yield"
    async with database.writing() as session:
        assert await claimed.release(session, long.id, long.worker) == "queued"
    taken = await held(database)
    assert taken.id == short
    await finish(database, taken, Cancelled())
    again = [await held(database), await held(database)]
    assert again[1].id == long.id, "behind what waited already"
    assert again[1].attempts == 1, "no attempt was counted"
    assert again[1].started_ms == long.started_ms
    async with database.reading() as session:
        row = await fine_tuning.find_job(session, None, long.id)
        told = [event.message for event in await fine_tuning.events_since(session, long.id, 0, 50)]
    assert row.wanted == "none"
    assert (
        "Another tenant's job is waiting: this job stores a checkpoint and returns to the queue"
        in told
    )


async def test_a_job_gives_way_to_no_lower_priority_to_no_full_tenant_and_to_no_equal(
    database: Database,
) -> None:
    first, second = (
        await make_tenant(database, "first"),
        await make_tenant(database, "second", running_jobs=1),
    )
    await make_job(database, first, priority=1)
    long = await held(database)
    await make_job(database, second)
    assert await make_way(database, long) is None, "its priority is higher"
    other = await held(database)
    assert other.tenant == "second"
    await make_job(database, second, priority=2)
    assert await make_way(database, long) is None, "second has as many as it may"
    await finish(database, other, Cancelled())
    assert await make_way(database, long) == long.id


async def test_what_an_owner_asks_of_a_job_that_gives_way_holds(database: Database) -> None:
    first, second = await make_tenant(database, "first"), await make_tenant(database, "second")
    for what, status in (("cancel", "cancelled"), ("pause", "paused")):
        await make_job(database, first)
        long = await held(database)
        waiting = await make_job(database, second)
        assert await make_way(database, long) == long.id
        async with database.writing() as session:
            await fine_tuning.request_change(session, first.id, long.id, what)  # type: ignore[arg-type]
        async with database.writing() as session:
            assert await claimed.release(session, long.id, long.worker) == status
            await fine_tuning.request_change(session, second.id, waiting, "cancel")


async def test_a_lost_job_that_was_to_give_way_waits_behind_the_others(database: Database) -> None:
    first, second = await make_tenant(database, "first"), await make_tenant(database, "second")
    await make_job(database, first)
    long = await held(database, lease=0.0)
    short = await make_job(database, second)
    assert await make_way(database, long) == long.id
    await asyncio.sleep(0.01)
    assert (await held(database)).id == short
