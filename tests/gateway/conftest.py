"""One gateway with one fake engine per module, and tenants on it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reft_serve.testing import FakeEngine
from tests.support.gateway.fake_worker import FakeWorker
from tests.support.gateway.harness import Gateway, Tenant, running
from tests.support.postgres import BOTH, create_database


@pytest.fixture(scope="module")
def _both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, FakeEngine]]:
    with running(tmp_path_factory.mktemp("gateway")) as (gateway, (engine,)):
        yield gateway, engine


@pytest.fixture
def gateway(_both: tuple[Gateway, FakeEngine]) -> Gateway:
    return _both[0]


@pytest.fixture
def engine(_both: tuple[Gateway, FakeEngine]) -> Iterator[FakeEngine]:
    """The fake engine, as it was before, after each test."""
    engine = _both[1]
    yield engine
    engine.token_seconds, engine.healthy, engine.refuse_adapters = 0.0, True, None
    engine.fail_with = engine.break_after = None
    engine.has_chat_template = engine.embeds = True


@pytest.fixture
def make_tenant(gateway: Gateway) -> Callable[..., Tenant]:
    def made(name: str = "", **options: object) -> Tenant:
        return gateway.tenant(name or f"t{secrets.token_hex(4)}", **options)  # type: ignore[arg-type]

    return made


@pytest.fixture
def tenant(make_tenant: Callable[..., Tenant]) -> Tenant:
    return make_tenant()


@pytest.fixture
def worker(gateway: Gateway) -> FakeWorker:
    """The queue's only worker; what other tests left in it is cleared away."""
    for job in gateway.admin.get("/v1/admin/jobs", params={"limit": 1000}).json()["data"]:
        if job["status"] in ("queued", "paused"):
            gateway.admin.post(f"/v1/admin/jobs/{job['id']}/cancel")
    return FakeWorker(gateway.settings)


@pytest.fixture(params=BOTH)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'reft.db'}"
        return
    yield create_database(request.getfixturevalue("postgres"), f"gateway_{secrets.token_hex(6)}")
