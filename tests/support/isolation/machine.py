"""Tenants against one another: a machine of random acts, whose every answer must be what the actor's own world allows.

The model of each tenant's world is kept apart from the others', so an answer that holds anything of another's (a name, an
id, a version's weights, a count, a cache salt) differs from what the model says.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from reft_serve.gateway.engines.engine import engine_name
from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway
from tests.support.isolation.worlds import Adapter, Alias, HeldKey, World

NAMES_, ALIASES_ = ("birds", "cats"), ("production", "canary")
HOWS = ("base", "bare", "owned", "version", "alias", "full", "engine")
NAMES = st.sampled_from(NAMES_)
WHO = st.integers(0, 2)
VERSIONS = st.integers(1, 4)
ALIASES = st.sampled_from(ALIASES_)
TOKENS = 2
SCOPES = ("inference", "models", "adapters", "usage", "keys", "files", "jobs", "webhooks")
ENDPOINTS: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "hello", "max_tokens": TOKENS},
    "chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": TOKENS},
    "responses": {"input": "hello", "max_output_tokens": TOKENS},
    "embeddings": {"input": "hello"},
    "classify": {"input": "hello"},
}
# What a key of each scope can look at: nothing of it may be another tenant's.
VIEWS = {
    "models": "/v1/models", "adapters": "/v1/adapters", "keys": "/v1/keys", "usage": "/v1/usage?group_by=tenant&group_by=key",
    "inference": "/v1/tenant", "files": "/v1/files", "jobs": "/v1/fine_tuning/jobs", "webhooks": "/v1/webhook_endpoints",
}  # fmt: skip


class Tenants(RuleBasedStateMachine):
    """Three tenants, two names for adapters, so that the same name is often several tenants'."""

    gateway: Gateway
    engine: FakeEngine
    generation = 0
    tally: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.worlds: list[World] = []
        self.grants: set[tuple[int, str, int]] = set()
        self.asked = 0

    @initialize()
    def fresh_tenants(self) -> None:
        type(self).generation += 1
        for k in range(3):
            tenant = self.gateway.tenant(f"g{self.generation}t{k}")
            (key,) = tenant.http.get("/v1/keys").json()["data"]
            self.worlds.append(World(tenant, key["id"]))
            self._upload(
                k, "birds", k + 1
            )  # so that there is something to take from the first step on
        given = self.worlds[0].tenant.http.put(
            f"/v1/adapters/birds/shares/{self.worlds[1].tenant.id}"
        )
        assert given.status_code == 200
        self.grants.add((0, "birds", 1))

    def teardown(self) -> None:
        for world in self.worlds:
            for client in (world.tenant.http, *(key.http for key in world.keys)):
                client.close()

    def _acts(self, who: int) -> World | None:
        """The actor's world; None where it is shut out, which it is told."""
        self.tally["steps"] += 1
        world = self.worlds[who]
        if not world.disabled:
            return world
        assert world.tenant.http.get("/v1/models").status_code == 401
        return None

    def _given(self, who: int) -> set[str]:
        """The versions of others' that the tenant may call by their full names alone."""
        return set()

    def _ids(self, who: int) -> set[str]:
        """What nobody else may see of a tenant's."""
        world = self.worlds[who]
        return {world.tenant.id, world.key_id, *(key.id for key in world.keys)}

    @rule(who=WHO, name=NAMES, seed=st.integers(1, 4))
    def upload(self, who: int, name: str, seed: int) -> None:
        if self._acts(who) is not None:
            self._upload(who, name, seed)

    def _upload(self, who: int, name: str, seed: int) -> None:
        world = self.worlds[who]
        answer = world.tenant.upload(name, seed)
        assert answer.status_code == 201, answer.text
        made, adapter = answer.json(), world.adapters.setdefault(name, Adapter())
        assert made["version"] == adapter.next
        adapter.versions[adapter.next] = (made["model"], made["digest"])
        adapter.next += 1

    @rule(who=WHO, name=NAMES, by_model=st.booleans())
    def delete(self, who: int, name: str, by_model: bool) -> None:
        if (world := self._acts(who)) is None:
            return
        adapter = world.adapters.get(name)
        # By OpenAI's route a name must be one that answers.
        there = adapter is not None and not (by_model and adapter.bare() is None)
        answer = world.tenant.http.delete(f"/v1/{'models' if by_model else 'adapters'}/{name}")
        assert answer.status_code == (200 if there else 404), answer.text
        if there:
            del world.adapters[name]
            self.grants = {grant for grant in self.grants if grant[:2] != (who, name)}

    @rule(who=WHO, name=NAMES, number=VERSIONS)
    def delete_version(self, who: int, name: str, number: int) -> None:
        if (world := self._acts(who)) is None:
            return
        adapter = world.adapters.get(name, Adapter())
        answer = world.tenant.http.delete(f"/v1/adapters/{name}/versions/{number}")
        if number not in adapter.versions:
            assert answer.status_code == 404
        elif any(alias.number == number for alias in adapter.aliases.values()):
            assert answer.status_code == 409
        else:
            assert answer.status_code == 200
            del adapter.versions[number]
            for alias in adapter.aliases.values():
                alias.previous = None if alias.previous == number else alias.previous

    @rule(
        who=WHO, name=NAMES, alias=ALIASES, number=VERSIONS, share=st.sampled_from([None, 0.0, 1.0])
    )
    def point(self, who: int, name: str, alias: str, number: int, share: float | None) -> None:
        if (world := self._acts(who)) is None:
            return
        share = None if alias == "production" else share
        body = {"version": str(number)} | ({} if share is None else {"share": share})
        answer = world.tenant.http.put(f"/v1/adapters/{name}/aliases/{alias}", json=body)
        adapter = world.adapters.get(name, Adapter())
        assert answer.status_code == (200 if number in adapter.versions else 404), answer.text
        if answer.status_code == 200:
            moved = adapter.aliases.setdefault(alias, Alias(number))
            if moved.number != number:
                moved.number, moved.previous = number, moved.number
            moved.share = moved.share if share is None else share

    @rule(who=WHO, name=NAMES, alias=ALIASES)
    def roll_back(self, who: int, name: str, alias: str) -> None:
        if (world := self._acts(who)) is None:
            return
        answer = world.tenant.http.post(f"/v1/adapters/{name}/aliases/{alias}/rollback")
        found = world.adapters.get(name, Adapter()).aliases.get(alias)
        if found is None:
            assert answer.status_code == 404
        elif found.previous is None:
            assert answer.status_code == 409
        else:
            assert answer.json()["version"] == found.previous
            found.number, found.previous = found.previous, None

    @rule(who=WHO, name=NAMES, to=WHO, give=st.booleans())
    def share(self, who: int, name: str, to: int, give: bool) -> None:
        if (world := self._acts(who)) is None:
            return
        url = f"/v1/adapters/{name}/shares/{self.worlds[to].tenant.id}"
        self._ask(
            to, who, name, 1, "production", "owned", "completions"
        )  # so that the gateway remembers the answer
        answer = world.tenant.http.request("PUT" if give else "DELETE", url)
        grant = (who, name, to)
        if name not in world.adapters:
            assert answer.status_code == 404
        elif give:
            assert answer.status_code == (400 if who == to else 200)
            self.grants |= set() if who == to else {grant}
        else:
            assert answer.status_code == (200 if grant in self.grants else 404)
            self.grants -= {grant}
        for how in ("owned", "bare"):
            self._ask(to, who, name, 1, "production", how, "completions")

    @invariant()
    def somebody_asks_for_something(self) -> None:
        """At every step, in turns: who, whose, by which kind of name, at which endpoint."""
        if not self.worlds:
            return
        n = self.asked = self.asked + 1
        who, owner, name, number = n % 3, n // 3 % 3, NAMES_[n // 2 % 2], 1 + n // 5 % 4
        if n % 4 == 0:
            self._pry(who, (who + 1 + n // 4 % 2) % 3, name)
        self._ask(
            who,
            owner,
            name,
            number,
            ALIASES_[n // 4 % 2],
            HOWS[n // 3 % 7],
            sorted(ENDPOINTS)[n // 7 % 4],
        )

    def _ask(
        self, who: int, owner: int, name: str, number: int, alias: str, how: str, endpoint: str
    ) -> None:
        world = self.worlds[who]
        if world.disabled:
            return
        theirs = self.worlds[owner]
        adapter = theirs.adapters.get(name, Adapter())
        may = who == owner or ((owner, name, who) in self.grants and not theirs.disabled)
        model, wanted = f"{theirs.tenant.name}/{name}", adapter.bare() if may else None
        if how == "base":
            model, wanted = "base", None
        elif how == "bare":
            adapter = world.adapters.get(name, Adapter())
            model, wanted = name, adapter.bare()
        elif how == "version":
            model, wanted = (
                f"{model}@{number}",
                number if may and number in adapter.versions else None,
            )
        elif how == "alias":
            named = adapter.aliases.get(alias)
            model, wanted = f"{model}@{alias}", named.number if may and named else None
        elif how == "full":
            there = number in adapter.versions
            model = adapter.versions[number][0] if there else "ft:base:nobody:x:y"
            wanted = number if there and (may or model in self._given(who)) else None
        elif how == "engine":
            model, wanted = (
                engine_name(adapter.versions[number][1])
                if number in adapter.versions
                else "reft-v-",
                None,
            )
        before = len(self.engine.requests)
        answer = world.tenant.http.post(
            f"/v1/{endpoint}", json={"model": model, **ENDPOINTS[endpoint]}
        )
        self.tally[f"asked, {answer.status_code}"] += 1
        if how != "base" and wanted is None:
            assert answer.status_code == 404, (model, answer.text)
            assert len(self.engine.requests) == before
            return
        assert answer.status_code == 200, (model, answer.text)
        sent = self.engine.requests[-1]
        if wanted is not None:
            assert answer.headers["x-reft-version"] == f"{name}@{wanted}"
            assert sent["model"] == engine_name(adapter.versions[wanted][1])
        world.requests[world.key_id] += 1
        world.tokens += 0 if endpoint in ("embeddings", "classify") else TOKENS
        world.salts.add(sent["cache_salt"])

    @rule(
        who=WHO,
        role=st.sampled_from(["owner", "inference"]),
        scopes=st.none() | st.sets(st.sampled_from(SCOPES)),
    )
    def make_key(self, who: int, role: str, scopes: set[str] | None) -> None:
        if (world := self._acts(who)) is None:
            return
        body = {"role": role} | ({} if scopes is None else {"scopes": sorted(scopes)})
        answer = world.tenant.http.post("/v1/keys", json=body)
        if role == "inference" and set(scopes or ()) - {"inference", "models"}:
            assert answer.status_code == 403
            return
        assert answer.status_code == 201, answer.text
        self._hold(world, answer.json())

    def _hold(self, world: World, made: dict[str, Any]) -> None:
        client = self.gateway.http(made["secret"])
        world.keys.append(HeldKey(made["id"], client, made["role"], frozenset(made["scopes"])))

    @rule(who=WHO, by=st.integers(0, 9), of=st.integers(0, 9), end=st.booleans())
    def rotate_or_revoke(self, who: int, by: int, of: int, end: bool) -> None:
        """With one of its keys, a tenant ends or renews another one."""
        if (world := self._acts(who)) is None or not world.keys:
            return
        actor, key = world.keys[by % len(world.keys)], world.keys[of % len(world.keys)]
        url = f"/v1/keys/{key.id}"
        assert key.http.get("/v1/tenant").status_code == (200 if key.alive else 401)
        answer = actor.http.delete(url) if end else actor.http.post(f"{url}/rotate")
        if not actor.alive:
            assert answer.status_code == 401
        elif "keys" not in actor.scopes:
            assert answer.status_code == 403
        elif end:
            assert answer.status_code == (409 if actor is key else 200)
            key.alive = key.alive and actor is key
        elif not key.alive or key.scopes - actor.scopes:
            assert answer.status_code == 403
        else:
            assert answer.status_code == 201, answer.text
            key.alive = False
            self._hold(world, answer.json())
            assert world.keys[-1].scopes == key.scopes
        assert key.http.get("/v1/tenant").status_code == (200 if key.alive else 401)

    @rule(who=WHO, of=st.integers(0, 9), what=st.sampled_from(SCOPES))
    def use_key(self, who: int, of: int, what: str) -> None:
        """A key does what its scopes say, in its own tenant's name, and nothing once it is dead."""
        if (world := self._acts(who)) is None or not world.keys:
            return
        key = world.keys[of % len(world.keys)]
        answer = key.http.get(VIEWS[what])
        if not key.alive:
            assert answer.status_code == 401
        elif what == "inference":
            assert answer.json()["id"] == world.tenant.id
            asked = key.http.post(
                "/v1/completions", json={"model": "base", **ENDPOINTS["completions"]}
            )
            assert asked.status_code == (200 if "inference" in key.scopes else 403)
            if asked.status_code == 200:
                world.requests[key.id] += 1
                world.tokens += TOKENS
                world.salts.add(self.engine.requests[-1]["cache_salt"])
        else:
            assert answer.status_code == (200 if what in key.scopes else 403)

    @rule(who=WHO, off=st.booleans())
    def disable(self, who: int, off: bool) -> None:
        self.tally["steps"] += 1
        mine = sorted(grant for grant in self.grants if grant[0] == who)
        for owner, name, to in mine:
            self._ask(to, owner, name, 1, "production", "owned", "completions")
        answer = self.gateway.admin.patch(
            f"/v1/admin/tenants/{self.worlds[who].tenant.id}", json={"disabled": off}
        )
        assert answer.status_code == 200
        self.worlds[who].disabled = off
        for owner, name, to in mine:
            self._ask(to, owner, name, 1, "production", "owned", "completions")

    def _pry(self, who: int, other: int, name: str) -> None:
        """What names others' things gets nothing of them, and changes nothing."""
        world = self.worlds[who]
        if world.disabled:
            return
        theirs, http = self.worlds[other], world.tenant.http
        for key in [theirs.key_id, *(key.id for key in theirs.keys)]:
            assert http.delete(f"/v1/keys/{key}").status_code == 404
            assert http.post(f"/v1/keys/{key}/rotate").status_code == 404
        full = f"{theirs.tenant.name}/{name}"
        assert http.delete(f"/v1/models/{full}").status_code == 404
        for model, _ in theirs.adapters.get(name, Adapter()).versions.values():
            assert http.delete(f"/v1/models/{model}").status_code == 404
        may = (other, name, who) in self.grants and not theirs.disabled
        there = theirs.adapters.get(name, Adapter()).bare() is not None
        assert http.get(f"/v1/models/{full}").status_code == (200 if may and there else 404)
        secrets = self._ids(other)
        for path in (
            *VIEWS.values(),
            "/v1/audit?limit=1000",
            "/v1/usage?group_by=model&group_by=version",
        ):
            text = http.get(path).text
            shared_with = {
                entry
                for entry in secrets
                if path.startswith("/v1/audit") and entry == theirs.tenant.id
            }
            assert not [secret for secret in secrets - shared_with if secret in text], path
        for path in (
            "/v1/usage?all_tenants=true",
            "/v1/audit?all_tenants=true",
            "/v1/admin/tenants",
            "/metrics",
        ):
            assert http.get(path).status_code == 403
        self.tally["pried"] += 1

    @invariant()
    def each_sees_its_own_models_and_what_is_shared(self) -> None:
        for who, world in enumerate(self.worlds):
            if world.disabled:
                continue
            seen = Counter(
                model["id"] for model in world.tenant.http.get("/v1/models").json()["data"]
            )
            expected = Counter(["base"])
            for name, adapter in world.adapters.items():
                expected.update([name, *(model for model, _ in adapter.versions.values())])
                expected.update(f"{name}@{alias}" for alias in adapter.aliases)
            for owner, name, to in self.grants:
                if to == who and not self.worlds[owner].disabled:
                    full = f"{self.worlds[owner].tenant.name}/{name}"
                    aliases = self.worlds[owner].adapters[name].aliases
                    expected.update([full, *(f"{full}@{alias}" for alias in aliases)])
            assert seen == expected + Counter(self._given(who))

    @invariant()
    def each_is_counted_for_its_own_requests_only(self) -> None:
        for world in self.worlds:
            if world.disabled:
                continue
            found = world.tenant.http.get("/v1/usage?group_by=key").json()["data"]
            assert {each["group"]["key"]: each["requests"] for each in found} == dict(
                world.requests
            )
            assert sum(each["completion_tokens"] for each in found) == world.tokens

    @invariant()
    def no_two_share_a_cache_salt(self) -> None:
        salts = [world.salts for world in self.worlds]
        assert all(len(own) <= 1 for own in salts)
        assert len(set().union(*salts)) == sum(map(len, salts))
