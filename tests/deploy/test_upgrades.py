"""The runbook's steps for changes while tenants work, carried out with processes: no request fails,
nothing is lost.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

import pytest

from tests.support.deploy.load import TOKENS, asking
from tests.support.deploy.site import Site
from tests.support.postgres import execute, postgres_server

MODELS = ["base", "cats", "birds", "birds@1"]
# What the next release needs: a column more in a table that is written to all the time, and a
# table.
MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = {last!r}


def upgrade() -> None:
    op.add_column("usage", sa.Column("region", sa.String(16), nullable=True))
    op.create_table("regions", sa.Column("id", sa.String(16), primary_key=True))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two gateways, two engines, PostgreSQL."""
    with postgres_server() as server:
        name = f"site_{secrets.token_hex(6)}"
        execute(server, f"CREATE DATABASE {name}")
        made = Site(tmp_path_factory.mktemp("site"), f"{server.rpartition('/')[0]}/{name}")
        try:
            made.admin("migrate")
            for _ in range(2):
                made.start_engine()
            for _ in range(2):
                made.start_gateway()
            yield made
        finally:
            made.stop()


@pytest.fixture(scope="module")
def key(site: Site) -> list[str]:
    """The key that callers use, which a test may exchange."""
    site.admin("tenant", "create", "acme")
    made = site.admin("key", "create", "acme", "--role", "admin")
    site.upload(made, ["cats", "birds"])
    return [made]


def test_engines_are_replaced_one_by_one_under_load(site: Site, key: list[str]) -> None:
    with asking(site.balancer.url, key, MODELS) as tally:
        tally.grow(50)
        for address in list(site.engines):
            site.stop_engine(address)
            tally.grow(30)
            fresh = site.start_engine()
            tally.grow(60)
            assert fresh.counts["requests"], "nobody asks the new engine"
    assert tally.failures == []


def test_gateways_are_replaced_one_by_one_under_load(site: Site, key: list[str]) -> None:
    before = list(site.gateways)
    with asking(site.balancer.url, key, MODELS) as tally:
        tally.grow(50)
        for port in before:
            site.start_gateway()
            site.stop_gateway(port)
            tally.grow(50)
    assert tally.failures == []
    assert not set(before) & set(site.gateways)


def test_a_key_is_rotated_under_load(site: Site, key: list[str]) -> None:
    old = key[0]
    with site.http(old) as client, asking(site.balancer.url, key, MODELS) as tally:
        tally.grow(30)
        (first,) = [
            each for each in client.get("/v1/keys").json()["data"] if each["role"] == "admin"
        ]
        made = client.post(f"/v1/keys/{first['id']}/rotate", params={"overlap_seconds": 2})
        assert made.status_code == 201, made.text
        tally.grow(30)  # both are good
        key[0] = made.json()["secret"]
        tally.grow(60)
        assert tally.failures == []
    with site.http(key[0]) as client:
        wait_until_refused(site, old)
        assert client.get("/v1/models").status_code == 200


def wait_until_refused(site: Site, key: str) -> None:
    deadline = time.monotonic() + 10
    with site.http(key) as client:
        while client.get("/v1/models").status_code != 401:
            assert time.monotonic() < deadline, "the old key is still good"
            time.sleep(0.1)


def test_the_next_release_comes_with_its_migration_first_and_its_gateways_after(
    site: Site, key: list[str]
) -> None:
    (last,) = execute(site.settings["REFT_DATABASE"], "SELECT version_num FROM alembic_version")[0]
    before = list(site.gateways)
    site.next_release(MIGRATION.format(last=last))
    with asking(site.balancer.url, key, MODELS) as tally:
        tally.grow(50)
        site.admin("migrate")  # the old gateways work on
        assert execute(
            site.settings["REFT_DATABASE"], "SELECT version_num FROM alembic_version"
        ) == [("9999",)]
        tally.grow(50)
        for port in before:
            site.start_gateway()
            site.stop_gateway(port)
            tally.grow(50)
    assert tally.failures == []


def test_every_answer_of_all_this_is_in_the_ledger(site: Site, key: list[str]) -> None:
    with site.http(key[0]) as client:
        found = client.get("/v1/usage?group_by=status").json()["data"]
    rows = {each["group"]["status"]: each for each in found}
    assert set(rows) == {"completed"}
    assert rows["completed"]["completion_tokens"] == TOKENS * rows["completed"]["requests"]
    assert execute(site.settings["REFT_DATABASE"], "SELECT count(*) FROM admissions") == [(0,)]
