"""The training worker: what a job becomes, how it is stopped and goes on, and what remains of what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import httpx
import pytest

from reft_serve.adapters.directory import read_adapter
from reft_serve.database import tenants
from reft_serve.database.connection import Database
from reft_serve.database.files import key_of_blob
from reft_serve.database.jobs import fine_tuning
from reft_serve.database.migrations.schema import migrate
from reft_serve.database.models import Job, Version
from reft_serve.training.jobs.health import server
from reft_serve.training.jobs.sweeping import sweep
from tests.support.buckets import s3_bucket
from tests.support.training.jobs import MODEL, QUICK, Place, rows

pytestmark = pytest.mark.anyio
# Steps of half a second and more, so that a test can do something during one.
SLOW: dict[str, Any] = {"n_epochs": 3, "batch_size": 4, "save_every": 2}
SLOW_ROWS = rows(5, 16, 150)


@pytest.fixture(scope="module")
async def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The digests of a slow job's versions where nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    database = Database(f"sqlite:///{folder / 'reft.db'}")
    await migrate(database)
    place = Place(folder, database, f"sqlite:///{folder / 'reft.db'}")
    async with place.worker():
        job_id = await place.job(content=SLOW_ROWS, **SLOW)
        await place.until(job_id, "succeeded")
    found = await place.version_digests(job_id)
    await database.close()
    return found


async def test_a_job_becomes_versions_that_can_be_called_and_leaves_nothing_else(
    place: Place,
) -> None:
    async with place.worker():
        job_id = await place.job(held_out=rows(1, 5))
        job = await place.until(job_id, "succeeded")
        assert (job.step, job.steps, job.attempts, job.error) == (6, 6, 1, None)
        assert job.resolved["kind"] == "loreft"
        assert job.resolved["rank"] == QUICK["rank"]
        assert job.trained_tokens
        assert job.memory_bytes
        *checkpoints, own = await place.version_digests(job_id)
        async with place.database.reading() as session:
            listed, _ = await fine_tuning.list_checkpoints(session, job_id)
        assert [each.step for each in listed] == [6, 4, 2]
        assert [each.version.digest for each in listed] == list(reversed(checkpoints))
        best = min(listed, key=lambda each: each.metrics["valid_loss"])
        assert best.version.digest == own, "the best checkpoint on held-out data is the version"
        assert all(0 <= each.metrics["valid_mean_token_accuracy"] <= 1 for each in listed)
        assert job.fine_tuned_model == f"ft:base:{job.tenant.name}:{job.adapter}:{job_id[-8:]}"
        assert listed[0].version.model_id == f"{job.fine_tuned_model}:ckpt-step-6"
        for digest in (own, *checkpoints):
            assert read_adapter(place.store.path(digest)).digest == digest
        assert job.result_file_id
        lines = (
            b"".join([part async for part in place.blobs.read(key_of_blob(job.result_file_id))])
            .decode()
            .splitlines()
        )
        assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
        assert [line.split(",")[0] for line in lines[1:]] == list("123456")
        assert all(0 <= float(line.split(",")[2]) <= 1 for line in lines[1:])
        assert [bool(line.split(",")[3]) for line in lines[1:]] == [
            False,
            True,
            False,
            True,
            False,
            True,
        ]
        told = await place.told(job_id)
        assert [line.partition(":")[0] for line in told if line.startswith("Step")].count(
            "Step 6/6"
        ) == 2
        assert told[-2:] == [
            f"New fine-tuned model created: {job.fine_tuned_model}",
            "The job has successfully completed",
        ]
    assert await place.orphans() == []


async def test_a_job_continues_from_a_version_and_records_its_lineage(place: Place) -> None:
    tenant = await place.tenant()
    async with place.worker():
        first = await place.until(await place.job(tenant), "succeeded")
        async with place.database.reading() as session:
            parent = await session.get(Version, first.version_id)
        assert parent is not None
        content = rows(3)
        job_id = await place.job(tenant, content=content, parent=parent, learning_rate=1e-9)
        job = await place.until(job_id, "succeeded")
        async with place.database.reading() as session:
            made = await session.get(Version, job.version_id)
        assert made is not None
        digest = hashlib.sha256(content).hexdigest()
        assert made.facts["lineage"] == {
            "job": job_id,
            "parent": parent.model_id,
            "parent_sha256": parent.digest,
            "step": 6,
            "data_sha256": digest,
        }
        ours, theirs = (read_adapter(place.store.path(each.digest)) for each in (made, parent))
        assert ours.manifest.interventions == theirs.manifest.interventions
        for mine, before in zip(ours.weights, theirs.weights, strict=True):
            for name, tensor in mine.tensors().items():
                assert (tensor - before.tensors()[name]).abs().max() < 1e-6, (
                    "it started at the parent's weights"
                )
        place.store.remove(parent.digest)
        orphan = await place.until(await place.job(tenant, parent=parent), "failed")
    assert orphan.error == {
        "code": "model_missing",
        "param": "model",
        "message": f"the model {parent.model_id} was deleted: create a new job with another model",
    }


async def test_preferences_are_learnt_from(place: Place) -> None:
    pair = (
        '{"input": {"messages": [{"role": "user", "content": "Tell me of %d"}]}, '
        '"preferred_output": [{"role": "assistant", "content": "a bird"}], '
        '"non_preferred_output": [{"role": "assistant", "content": "a cat"}]}\n'
    )
    data = "".join(pair % k for k in range(8)).encode()
    async with place.worker():
        job_id = await place.job(content=data, method="dpo", held_out=data, beta=0.2)
        job = await place.until(job_id, "succeeded")
    assert (job.resolved["method"], job.resolved["beta"]) == ("dpo", 0.2)


async def test_a_paused_job_goes_on_at_another_worker_to_the_same_bits(
    place: Place, undisturbed: list[str]
) -> None:
    async with place.worker():
        job_id = await place.job(content=SLOW_ROWS, **SLOW)
        await place.wait(job_id, lambda job: job.step >= 3)
        await place.ask(job_id, "pause")
        at = place.steps_done("one")
        paused = await place.until(job_id, "paused", seconds=30)
        assert paused.worker is None
        assert at <= paused.step <= at + 2, (
            "it stopped at the end of the step that it was in, or of the next"
        )
        (kept,) = await place.blobs.list(f"checkpoints/{job_id}")
        assert kept.key.endswith(f"step-{paused.step:09}.tar")
    await place.ask(job_id, "resume")
    async with place.worker("two"):
        done = await place.until(job_id, "succeeded")
    assert done.attempts == 1
    assert await place.version_digests(job_id) == undisturbed
    steps = [line.split("/")[0] for line in await place.told(job_id) if line.startswith("Step")]
    assert len(set(steps)) == len(steps) == 12, "no step was told twice"
    assert await place.orphans() == []


async def test_a_job_goes_on_on_another_day_whatever_the_chat_template_writes(place: Place) -> None:
    base = Path(shutil.copytree(MODEL, place.folder / "base"))
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = "Now: {{ strftime_now('%H:%M:%S %f') }}.\n" + config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    turns = [
        {"role": "user", "content": "Tell me of %d"},
        {"role": "assistant", "content": " ".join(["a bird"] * 99)},
    ]
    content = "".join(json.dumps({"messages": turns}) % k + "\n" for k in range(12)).encode()
    async with place.worker(model=str(base)):
        job_id = await place.job(content=content, **SLOW)
        await place.wait(job_id, lambda job: job.step >= 2)
        await place.ask(job_id, "pause")
        await place.until(job_id, "paused", seconds=30)
    await place.ask(job_id, "resume")
    async with place.worker("two", model=str(base)):
        assert (await place.until(job_id, "succeeded")).attempts == 1


async def test_a_job_whose_name_is_reserved_fails_before_it_is_trained(place: Place) -> None:
    job_id = await place.job()
    async with place.database.writing() as session:
        (await fine_tuning.find_job(session, None, job_id)).adapter = "base"
    async with place.worker():
        job = await place.wait(job_id, lambda job: job.finished_ms is not None)
    assert job.error is not None
    assert (job.status, job.error["code"], job.error["param"], job.step) == (
        "failed",
        "reserved_name",
        "suffix",
        0,
    )


async def test_a_cancelled_job_stops_in_its_step_and_leaves_nothing(place: Place) -> None:
    async with place.worker():
        job_id = await place.job(content=SLOW_ROWS, **SLOW)
        await place.wait(job_id, lambda job: job.step >= 3)
        await place.ask(job_id, "cancel")
        at = place.steps_done("one")
        job = await place.until(job_id, "cancelled", seconds=30)
        assert job.step <= at + 1
        assert job.fine_tuned_model is None
        assert await place.version_digests(job_id) == []
    assert await place.orphans() == []


async def test_a_worker_that_is_told_to_end_gives_its_job_back_with_a_checkpoint(
    place: Place,
) -> None:
    async with place.worker():
        job_id = await place.job(content=SLOW_ROWS, **SLOW)
        await place.wait(job_id, lambda job: job.step >= 3)
    job = await place.find(job_id)
    assert (job.status, job.attempts) == ("queued", 0)
    assert [blob.key for blob in await place.blobs.list("checkpoints")] == [
        f"checkpoints/{job_id}/step-{job.step:09}.tar"
    ]


async def test_a_job_whose_process_dies_is_tried_again_and_a_poison_one_fails_with_its_reason(
    place: Place, undisturbed: list[str]
) -> None:
    """Weights that do not fit their configuration: nothing that a job could mend, and no fault that we name."""
    model = place.folder / "model"
    shutil.copytree(MODEL, model)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(
        config.replace('"intermediate_size": 512', '"intermediate_size": 500')
    )
    async with place.worker(model=str(model)):
        job_id = await place.job()
        job = await place.until(job_id, "failed")
        assert job.attempts == 3
        assert job.error is not None
        assert job.error["code"] == "too_many_attempts"
        assert "after 3 attempts" in job.error["message"]
        assert "ignore_mismatched_sizes" in (job.traceback or "")
        assert str(place.folder) not in " ".join(await place.told(job_id))
        (model / "config.json").write_text(config)
        killed = await place.job(content=SLOW_ROWS, **SLOW)
        await place.wait(killed, lambda job: job.step >= 3)
        for child in active_children():
            if child.pid:
                os.kill(child.pid, signal.SIGKILL)
        await place.until(killed, "succeeded")
        assert await place.version_digests(killed) == undisturbed
        assert any("failed; the job will be retried" in line for line in await place.told(killed))
    assert await place.orphans() == []


async def test_data_and_settings_that_cannot_be_used_fail_at_once_with_a_sentence(
    place: Place,
) -> None:
    tenant = await place.tenant()
    asked = {
        "damaged": await place.job(tenant),
        "missing": await place.job(tenant),
        "template": await place.job(tenant, content=b'{"prompt": "x"}\n'),
        "layer": await place.job(tenant, layers=[6]),
        "method": await place.job(tenant, method="dpo"),
        "target": await place.job(tenant, lora_rank=2, lora_targets=["nothing_of_this_name"]),
    }
    key = key_of_blob((await place.find(asked["damaged"])).training_file_id)
    (place.folder / "blobs" / key).write_bytes(b'{"prompt": "other", "completion": "bytes"}\n')
    await place.blobs.delete(key_of_blob((await place.find(asked["missing"])).training_file_id))
    async with place.worker():
        ended = {
            name: await place.until(job_id, "failed", "succeeded") for name, job_id in asked.items()
        }
    told = {
        name: (job.error or {}).get("code", "") + ": " + (job.error or {}).get("message", "")
        for name, job in ended.items()
    }
    for name, code, phrase in (
        ("damaged", "file_damaged", "was damaged after its upload"),
        ("missing", "file_missing", "no longer exists"),
        ("template", "data_invalid", 'line 1: has no "completion"'),
        ("layer", "invalid_request", "there is no layer 6"),
        ("method", "invalid_request", "learns from preferences"),
        ("target", "invalid_request", "nothing_of_this_name"),
    ):
        assert told[name].startswith(f"{code}: "), told
        assert phrase in told[name], told
        assert str(place.folder) not in told[name]
        assert ended[name].attempts == 1
    assert ended["damaged"].error == (ended["damaged"].error or {}) | {"param": "training_file"}
    assert await place.orphans() == []


async def test_a_base_model_that_vanished_holds_jobs_back_until_it_is_there_again(
    place: Place,
) -> None:
    model = place.folder / "model"
    shutil.copytree(MODEL, model)
    async with place.worker(model=str(model)) as worker:
        await until(lambda: worker.unready is None)
        os.rename(model / "model.safetensors", place.folder / "weights")
        job_id = await place.job()
        await until_told(
            place, job_id, "returned to the queue and will continue from its last checkpoint"
        )
        os.rename(model, place.folder / "elsewhere")
        await until(lambda: worker.unready is not None and "is not a directory" in worker.unready)
        assert (await place.find(job_id)).status == "queued"
        os.rename(place.folder / "elsewhere", model)
        os.rename(place.folder / "weights", model / "model.safetensors")
        job = await place.until(job_id, "succeeded")
        assert job.attempts == 1
        assert str(place.folder) not in " ".join(await place.told(job_id))


async def test_a_file_store_that_is_away_loses_no_job(place: Place, undisturbed: list[str]) -> None:
    """The store's directory is away, with a plain file in its place: first for the queue, then for a job under way."""
    blobs, aside = place.folder / "blobs", place.folder / "aside"
    async with place.worker() as worker:
        waiting = await place.job(content=SLOW_ROWS, **SLOW)
        await place.wait(waiting, lambda job: job.step >= 1)
        os.rename(blobs, aside)
        blobs.write_text("not a directory")
        await until_told(place, waiting, "could not be stored")
        blobs.unlink()
        os.rename(aside, blobs)
        await place.until(waiting, "succeeded")
        assert worker.alive
        assert await place.version_digests(waiting) == undisturbed
    assert await place.orphans() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 80 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a disk of its own can only be made by root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


async def test_a_full_disk_sends_a_job_back_and_holds_the_others(
    place: Place, undisturbed: list[str], small_disk: Path
) -> None:
    async with place.worker(work=small_disk / "work") as worker:
        job_id = await place.job(content=SLOW_ROWS, **SLOW)
        await place.wait(job_id, lambda job: job.step >= 3)
        with (
            contextlib.suppress(OSError),
            (small_disk / "filler").open("wb", buffering=0) as filler,
        ):
            while True:
                filler.write(bytes(1 << 20))
        await until_told(
            place, job_id, "returned to the queue and will continue from its last checkpoint"
        )
        await place.until(job_id, "queued")
        await until(lambda: worker.unready is not None and "No space left" in worker.unready)
        await asyncio.sleep(0.5)
        assert (await place.find(job_id)).status == "queued"
        (small_disk / "filler").unlink()
        job = await place.until(job_id, "succeeded")
        assert job.attempts == 1
        assert await place.version_digests(job_id) == undisturbed


async def test_what_needs_more_memory_than_there_is_waits_for_a_larger_worker(place: Place) -> None:
    async with place.worker(train_memory_bytes=1 << 30):
        job_id = await place.job()
        await until_told(place, job_id, "it waits for a larger one")
        assert (await place.find(job_id)).status == "queued"
    async with place.worker("large", train_memory_bytes=8 << 30):
        await place.until(job_id, "succeeded")


async def test_files_and_checkpoints_may_lie_in_s3(place: Place, undisturbed: list[str]) -> None:
    with s3_bucket() as url:
        remote = Place(place.folder, place.database, place.url, url)
        async with remote.worker():
            job_id = await remote.job(content=SLOW_ROWS, **SLOW)
            await remote.wait(job_id, lambda job: job.step >= 3)
        assert len(await remote.blobs.list(f"checkpoints/{job_id}")) == 1
        async with remote.worker("two"):
            await remote.until(job_id, "succeeded")
        assert await remote.version_digests(job_id) == undisturbed
        assert await remote.orphans() == []


async def test_an_orchestrator_can_ask_a_worker(place: Place) -> None:
    async with place.worker(model=str(place.folder / "model")) as worker:
        asked = server(worker, "127.0.0.1", 0)
        serving = asyncio.create_task(asked.serve())
        await until(lambda: asked.started)
        port = asked.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            assert (await http.get("/health/live")).status_code == 200
            ready = await http.get("/health/ready")
            assert (ready.status_code, "not a directory" in ready.json()["why"]) == (503, True)
            shutil.copytree(MODEL, place.folder / "model")
            await until(lambda: worker.unready is None)
            assert (await http.get("/health/ready")).json() == {"status": "ready"}
            assert "reft_worker_jobs 0.0" in (await http.get("/metrics")).text
        asked.should_exit = True
        await serving


async def test_jobs_run_beside_each_other_as_memory_allows(place: Place) -> None:
    async with place.worker(train_memory_bytes=4 << 30, train_jobs=3):
        found = [await place.job(n_epochs=8) for _ in range(3)]
        most = 0
        jobs: list[Job] = []
        while not jobs or any(job.status != "succeeded" for job in jobs):
            jobs = [await place.find(job_id) for job_id in found]
            running = [job for job in jobs if job.status == "running" and job.resolved]
            most = max(most, len(running))
            assert sum(job.memory_bytes or 0 for job in running) <= 4 << 30
            await asyncio.sleep(0.1)
    assert most == 2


async def test_a_sweep_removes_what_nobody_names_and_leaves_what_is_young_or_alive(
    place: Place,
) -> None:
    async with place.worker() as worker:
        job_id = await place.job()
        await place.until(job_id, "succeeded")
    around = worker._ctx
    kept = await place.version_digests(job_id)
    strange = place.folder / "strange"
    shutil.copytree(place.store.path(kept[0]), strange)
    (strange / "reft_config.json").write_text((strange / "reft_config.json").read_text() + "\n")
    orphan = place.store.publish(strange)
    paused = await place.job()
    await place.ask(paused, "pause")
    for owner in (job_id, paused, "ftjob-deleted"):
        await place.blobs.put(MODEL / "config.json", f"checkpoints/{owner}/step-000000002.tar")
    await sweep(around)
    assert place.store.path(orphan).is_dir(), "its publisher may be about to name it"
    os.utime(place.store.path(orphan), (1, 1))
    os.utime(place.store.path(kept[0]), (1, 1))
    await sweep(around)
    assert not place.store.path(orphan).exists()
    assert {digest for digest, _ in place.store.digests()} == set(kept)
    assert [blob.key for blob in await place.blobs.list("checkpoints")] == [
        f"checkpoints/{paused}/step-000000002.tar"
    ]


async def until(what: object, seconds: float = 30) -> None:
    assert callable(what)
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.02)


async def until_told(place: Place, job_id: str, phrase: str, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not any(phrase in line for line in await place.told(job_id)):
            await asyncio.sleep(0.05)


async def test_a_long_job_gives_way_to_another_tenants_and_goes_on_to_the_same_bits(
    place: Place, undisturbed: list[str]
) -> None:
    async with place.worker(train_turn_seconds=0.5):
        long = await place.job(content=SLOW_ROWS, **SLOW)
        await place.wait(long, lambda job: job.step >= 1)
        short = await place.job(n_epochs=1)
        done = await place.until(short, "succeeded")
        assert (await place.find(long)).status != "succeeded"
        finished = await place.until(long, "succeeded")
    assert done.attempts == finished.attempts == 1
    told = await place.told(long)
    assert any(line.startswith("Another tenant's job is waiting") for line in told)
    assert "The fine-tuning job continues" in told
    assert await place.version_digests(long) == undisturbed
    assert await place.orphans() == []


async def test_a_job_beyond_its_tenants_limits_fails_with_the_limit(place: Place) -> None:
    cases = {"job_examples": 23, "job_tokens": 50, "job_hours": 1e-6}
    async with place.worker():
        for name, most in cases.items():
            tenant = await place.tenant()
            async with place.database.writing() as session:
                (await tenants.find_tenant(session, tenant.id)).limits = {name: most}
            job_id = await place.job(tenant)  # 12 rows, 2 epochs
            job = await place.wait(job_id, lambda job: job.finished_ms is not None)
            assert (job.status, job.error and job.error["code"]) == ("failed", "job_limit"), name
            assert name in str(job.error)
    assert await place.orphans() == []
