"""The machine of `isolation_machine` with files, fine-tuning jobs, permissions and webhooks: all
that tenants can do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from reft_serve.database.jobs import queue as jobs
from tests.support.gateway.fake_worker import FakeWorker
from tests.support.gateway.uploads import jsonl
from tests.support.isolation.machine import NAMES, VERSIONS, WHO, Tenants
from tests.support.isolation.worlds import Adapter

ANY = st.integers(0, 9)
UNFINISHED = ("queued", "paused")


@dataclass
class Holdings:
    """What a tenant has beside adapters and keys: files by id, those of them that jobs wrote, jobs
    by id (status, file).
    """

    files: dict[str, bytes] = field(default_factory=dict)
    results: set[str] = field(default_factory=set)
    jobs: dict[str, tuple[str, str]] = field(default_factory=dict)
    webhooks: list[str] = field(default_factory=list)

    def all_ids(self) -> set[str]:
        return {*self.files, *self.jobs, *self.webhooks}


class Everything(Tenants):
    """`permissions[id]` is (owner, model, guest)."""

    seeds: ClassVar[Iterator[int]] = itertools.count(1000, 3)

    def __init__(self) -> None:
        super().__init__()
        self.holdings = [Holdings(), Holdings(), Holdings()]
        self.permissions: dict[str, tuple[int, str, int]] = {}

    @initialize()
    def fresh_tenants(self) -> None:
        super().fresh_tenants()
        self.worker = FakeWorker(self.gateway.settings)
        for who in range(3):
            self._upload_file(who)
        self._permit(2, "birds", 1, 0)

    def teardown(self) -> None:
        for held in self.holdings:
            for job, (status, _) in held.jobs.items():
                if status in UNFINISHED:
                    self.gateway.admin.post(f"/v1/admin/jobs/{job}/cancel")
        super().teardown()

    def _ids(self, who: int) -> set[str]:
        return super()._ids(who) | self.holdings[who].all_ids()

    def _lives(self, permission: tuple[int, str, int]) -> bool:
        owner, model, _ = permission
        versions = (adapter.versions.values() for adapter in self.worlds[owner].adapters.values())
        return any(model == each for each, _ in itertools.chain.from_iterable(versions))

    def _given(self, who: int) -> set[str]:
        return {
            model
            for owner, model, guest in self.permissions.values()
            if guest == who
            and not self.worlds[owner].disabled
            and self._lives((owner, model, guest))
        }

    @rule(who=WHO)
    def upload_file(self, who: int) -> None:
        if self._acts(who) is not None:
            self._upload_file(who)

    def _upload_file(self, who: int) -> None:
        tenant = self.worlds[who].tenant
        content = jsonl(
            {
                "messages": [
                    {"role": "user", "content": tenant.id},
                    {"role": "assistant", "content": "x"},
                ]
            }
        )
        sent = tenant.http.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("x.jsonl", content)}
        )
        self.holdings[who].files[sent.json()["id"]] = content

    @rule(who=WHO, owner=WHO, of=ANY, end=st.booleans())
    def read_or_delete_file(self, who: int, owner: int, of: int, end: bool) -> None:
        held = self.holdings[owner]
        if (world := self._acts(who)) is None or not held.files:
            return
        file = sorted(held.files)[of % len(held.files)]
        url = f"/v1/files/{file}"
        needed = any(status in UNFINISHED and used == file for status, used in held.jobs.values())
        if not end:
            assert world.tenant.http.get(url).status_code == (200 if who == owner else 404)
            content = world.tenant.http.get(f"{url}/content")
            assert content.status_code == (200 if who == owner else 404)
            assert who != owner or content.content == held.files[file]
            return
        answer = world.tenant.http.delete(url)
        assert answer.status_code == (404 if who != owner else 409 if needed else 200), answer.text
        if answer.status_code == 200:
            del held.files[file]

    @rule(who=WHO, owner=WHO, of=ANY, name=NAMES)
    def make_job(self, who: int, owner: int, of: int, name: str) -> None:
        files = sorted(self.holdings[owner].files)
        if (world := self._acts(who)) is None or not files:
            return
        body = {"model": "base", "training_file": files[of % len(files)], "suffix": name}
        answer = world.tenant.http.post("/v1/fine_tuning/jobs", json=body)
        written = body["training_file"] in self.holdings[owner].results
        assert answer.status_code == (404 if who != owner else 400 if written else 200), answer.text
        if answer.status_code == 200:
            self.holdings[who].jobs[answer.json()["id"]] = ("queued", body["training_file"])

    @rule(who=WHO, owner=WHO, of=ANY, what=st.sampled_from(["pause", "resume", "cancel", "look"]))
    def act_on_job(self, who: int, owner: int, of: int, what: str) -> None:
        held = self.holdings[owner].jobs
        if (world := self._acts(who)) is None or not held:
            return
        job = sorted(held)[of % len(held)]
        status, file = held[job]
        if what == "look":
            for path in ("", "/events", "/checkpoints"):
                answer = world.tenant.http.get(f"/v1/fine_tuning/jobs/{job}{path}")
                assert answer.status_code == (200 if who == owner else 404)
            return
        answer = world.tenant.http.post(f"/v1/fine_tuning/jobs/{job}/{what}")
        able = status in UNFINISHED and not (what == "resume" and status == "queued")
        assert answer.status_code == (404 if who != owner else 200 if able else 409), answer.text
        if answer.status_code == 200:
            held[job] = ({"pause": "paused", "resume": "queued", "cancel": "cancelled"}[what], file)

    @rule()
    def train(self) -> None:
        """A worker takes a job; whose it is decides who has a new version, and nobody else."""
        self.tally["steps"] += 1
        if any(world.disabled for world in self.worlds):
            return
        claim = self.worker.act(lambda session: jobs.claim(session, "fake", 60.0))
        if claim is None:
            assert not any(
                status == "queued" for held in self.holdings for status, _ in held.jobs.values()
            )
            return
        (owner,) = (k for k, held in enumerate(self.holdings) if claim.id in held.jobs)
        assert self.worker.succeed(claim, next(self.seeds)) == "succeeded"
        held, world = self.holdings[owner], self.worlds[owner]
        held.jobs[claim.id] = ("succeeded", held.jobs[claim.id][1])
        done = world.tenant.http.get(f"/v1/fine_tuning/jobs/{claim.id}").json()
        result = done["result_files"][0]
        held.results.add(result)
        held.files[result] = world.tenant.http.get(f"/v1/files/{result}/content").content
        adapter = world.adapters.setdefault(done["adapter"], Adapter())
        made = world.tenant.http.get(f"/v1/adapters/{done['adapter']}").json()["versions"]
        fresh = {
            each["version"]: (each["model"], each["digest"])
            for each in made
            if each["version"] >= adapter.next
        }
        assert sorted(fresh) == [adapter.next + k for k in range(3)]
        assert done["fine_tuned_model"] in {model for model, _ in fresh.values()}
        adapter.versions |= fresh
        adapter.next += 3
        self.tally["trained"] += 1

    @rule(who=WHO, owner=WHO, name=NAMES, number=VERSIONS, to=WHO)
    def permit(self, who: int, owner: int, name: str, number: int, to: int) -> None:
        versions = self.worlds[owner].adapters.get(name, Adapter()).versions
        if (world := self._acts(who)) is None or number not in versions:
            return
        if who == owner and to != who:
            self._permit(who, name, number, to)
            return
        url = f"/v1/fine_tuning/checkpoints/{versions[number][0]}/permissions"
        answer = world.tenant.http.post(url, json={"project_ids": [self.worlds[to].tenant.id]})
        assert answer.status_code == (404 if who != owner else 400), answer.text
        assert world.tenant.http.get(url).status_code == (200 if who == owner else 404)

    def _permit(self, who: int, name: str, number: int, to: int) -> None:
        model = self.worlds[who].adapters[name].versions[number][0]
        self._ask(to, who, name, number, "production", "full", "completions")
        url = f"/v1/fine_tuning/checkpoints/{model}/permissions"
        answer = self.worlds[who].tenant.http.post(
            url, json={"project_ids": [self.worlds[to].tenant.id]}
        )
        assert answer.status_code == 200, answer.text
        self.permissions[answer.json()["data"][0]["id"]] = (who, model, to)
        self._ask(to, who, name, number, "production", "full", "completions")

    @rule(who=WHO, of=ANY)
    def take_back(self, who: int, of: int) -> None:
        living = sorted(key for key, each in self.permissions.items() if self._lives(each))
        if (world := self._acts(who)) is None or not living:
            return
        permission = living[of % len(living)]
        owner, model, to = self.permissions[permission]
        answer = world.tenant.http.delete(
            f"/v1/fine_tuning/checkpoints/{model}/permissions/{permission}"
        )
        assert answer.status_code == (200 if who == owner else 404)
        if who == owner:
            del self.permissions[permission]
        for name, adapter in self.worlds[owner].adapters.items():
            for number in [
                number for number, (each, _) in adapter.versions.items() if each == model
            ]:
                self._ask(to, owner, name, number, "production", "full", "completions")

    @rule(who=WHO)
    def make_webhook(self, who: int) -> None:
        if (world := self._acts(who)) is None or self.holdings[who].webhooks:
            return
        hook = {
            "name": "x",
            "url": "http://127.0.0.1:9/",
            "event_types": ["fine_tuning.job.succeeded"],
        }
        made = world.tenant.http.post("/v1/webhook_endpoints", json=hook).json()
        self.holdings[who].webhooks.append(made["id"])

    @rule(who=WHO, other=WHO)
    def pry_into_webhooks(self, who: int, other: int) -> None:
        if who == other or (world := self._acts(who)) is None:
            return
        for webhook in self.holdings[other].webhooks:
            url = f"/v1/webhook_endpoints/{webhook}"
            http = world.tenant.http
            answers = (
                http.get(url),
                http.delete(url),
                http.post(f"{url}/rotate_secret"),
                http.post(url, json={"name": "y"}),
            )
            assert [answer.status_code for answer in answers] == [404] * 4

    @invariant()
    def each_sees_its_own_files_and_jobs(self) -> None:
        for world, held in zip(self.worlds, self.holdings, strict=False):
            if world.disabled:
                continue
            seen = set()
            for path in ("/v1/files", "/v1/fine_tuning/jobs?limit=1000", "/v1/webhook_endpoints"):
                page = world.tenant.http.get(path).json()
                assert not page["has_more"]
                seen |= {each["id"] for each in page["data"]}
            assert seen == held.all_ids()
