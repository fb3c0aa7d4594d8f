"""Tenants against one another: a machine of random acts, whose every answer must be what the actor's own world allows."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from reft_serve.gateway.fake_engine import FakeEngine
from tests.gateway.harness import Gateway, Tenant, running

NAMES = st.sampled_from(["birds", "cats", "rain"])
WHO = st.integers(0, 2)
VERSIONS = st.integers(1, 4)
TOKENS = 2


class Tenants(RuleBasedStateMachine):
    """Three tenants, three names: `model[k][name]` is what tenant k has under a name, version by version."""

    shared: contextlib.ExitStack
    gateway: Gateway
    engine: FakeEngine
    generation = 0

    def __init__(self) -> None:
        super().__init__()
        self.adapters: list[dict[str, dict[int, str]]] = [{}, {}, {}]
        self.next: list[dict[str, int]] = [{}, {}, {}]
        self.grants: set[tuple[int, str, int]] = set()
        self.requests = [0, 0, 0]
        self.alive = [True, True, True]

    @initialize()
    def fresh_tenants(self) -> None:
        type(self).generation += 1
        self.tenants: list[Tenant] = [self.gateway.tenant(f"g{self.generation}t{k}") for k in range(3)]
        self.salts: list[set[str]] = [set(), set(), set()]

    @rule(who=WHO, name=NAMES, seed=st.integers(1, 5))
    def upload(self, who: int, name: str, seed: int) -> None:
        if name not in self.adapters[who]:
            self.next[who][name] = 1
        answer = self.tenants[who].upload(name, seed)
        assert answer.status_code == 201, answer.text
        number = self.next[who][name]
        assert answer.json()["version"] == number
        self.next[who][name] = number + 1
        self.adapters[who].setdefault(name, {})[number] = answer.json()["model"]

    @rule(who=WHO, name=NAMES)
    def delete(self, who: int, name: str) -> None:
        answer = self.tenants[who].http.delete(f"/v1/adapters/{name}")
        assert answer.status_code == (200 if name in self.adapters[who] else 404)
        self.adapters[who].pop(name, None)
        self.grants = {grant for grant in self.grants if grant[:2] != (who, name)}

    @rule(who=WHO, name=NAMES, number=VERSIONS)
    def delete_version(self, who: int, name: str, number: int) -> None:
        answer = self.tenants[who].http.delete(f"/v1/adapters/{name}/versions/{number}")
        there = number in self.adapters[who].get(name, {})
        assert answer.status_code == (200 if there else 404)
        if there:
            del self.adapters[who][name][number]

    @rule(who=WHO, name=NAMES, to=WHO, give=st.booleans())
    def share(self, who: int, name: str, to: int, give: bool) -> None:
        url = f"/v1/adapters/{name}/shares/{self.tenants[to].id}"
        answer = self.tenants[who].http.request("PUT" if give else "DELETE", url)
        grant = (who, name, to)
        if name not in self.adapters[who]:
            assert answer.status_code == 404
        elif give:
            assert answer.status_code == (400 if who == to else 200)
            self.grants |= set() if who == to else {grant}
        else:
            assert answer.status_code == (200 if grant in self.grants else 404)
            self.grants -= {grant}

    @rule(who=WHO, owner=WHO, name=NAMES, how=st.sampled_from(["bare", "owned", "version", "full"]), number=VERSIONS)
    def ask(self, who: int, owner: int, name: str, how: str, number: int) -> None:
        versions = self.adapters[owner].get(name, {})
        may = bool(versions) and (who == owner or (owner, name, who) in self.grants)
        model = f"{self.tenants[owner].name}/{name}"
        if how == "bare":
            model, may = name, bool(self.adapters[who].get(name))
        elif how == "version":
            model, may = f"{model}@{number}", may and number in versions
        elif how == "full":
            model, may = versions.get(number, "ft:base:nobody:x:y"), may and number in versions
        body = {"model": model, "prompt": "hello", "max_tokens": TOKENS}
        answer = self.tenants[who].http.post("/v1/completions", json=body)
        assert answer.status_code == (200 if may else 404), (model, answer.text)
        if may:
            self.requests[who] += 1
            self.salts[who].add(self.engine.requests[-1]["cache_salt"])

    @rule(who=WHO, other=WHO)
    def pry(self, who: int, other: int) -> None:
        """What names others' things gets nothing of them."""
        if who == other:
            return
        key = self.tenants[other].http.get("/v1/keys").json()["data"][0]["id"]
        assert self.tenants[who].http.delete(f"/v1/keys/{key}").status_code == 404
        for path in ("/v1/models", "/v1/adapters", "/v1/keys", "/v1/usage?group_by=key", "/v1/audit", "/v1/tenant"):
            text = self.tenants[who].http.get(path).text
            assert self.tenants[other].id not in text, path
            assert key not in text, path

    @invariant()
    def each_sees_its_own_models_and_what_is_shared(self) -> None:
        for who, tenant in enumerate(getattr(self, "tenants", [])):
            seen = {model["id"] for model in tenant.http.get("/v1/models").json()["data"]}
            own = self.adapters[who]
            expected = {"base", *own, *(full for versions in own.values() for full in versions.values())}
            expected |= {f"{self.tenants[owner].name}/{name}" for owner, name, to in self.grants if to == who}
            assert seen == expected

    @invariant()
    def each_is_counted_for_its_own_requests_only(self) -> None:
        for who, tenant in enumerate(getattr(self, "tenants", [])):
            (total,) = tenant.http.get("/v1/usage").json()["data"]
            assert (total["requests"], total["completion_tokens"]) == (
                self.requests[who],
                TOKENS * self.requests[who],
            )

    @invariant()
    def no_two_share_a_cache_salt(self) -> None:
        salts = getattr(self, "salts", [])
        assert all(len(own) <= 1 for own in salts)
        assert len(set().union(*salts)) == sum(map(len, salts))


def test_no_tenant_reads_uses_counts_or_times_anothers() -> None:
    # REFT_TEST_EXAMPLES=200 makes 5,000 steps.
    examples = int(os.environ.get("REFT_TEST_EXAMPLES", "5"))
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as (gateway, (engine,)):
        Tenants.gateway, Tenants.engine = gateway, engine
        Tenants.TestCase.settings = settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            database=None,
        )
        Tenants.TestCase().runTest()
