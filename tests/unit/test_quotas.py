"""Limits per minute and at once of tenants and keys, counted in memory, without a server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from limits.aio.storage import MemoryStorage
from limits.errors import StorageError

from reft_serve.config import TenantLimits
from reft_serve.database.keys import Principal
from reft_serve.errors import DatabaseUnusable, RateLimited, ServiceError
from reft_serve.gateway.accounting.quotas import Quotas
from reft_serve.observability import BoundedNames

pytestmark = pytest.mark.anyio


def caller(tenant: str = "t1", key: dict[str, Any] | None = None, **limits: Any) -> Principal:
    counters = (("k1", key),) if key else ()
    return Principal(
        tenant,
        tenant,
        "k1",
        "owner",
        frozenset({"inference"}),
        "",
        limits,
        key or {},
        None,
        counters,
    )


@pytest.fixture
def quotas() -> Quotas:
    return Quotas(TenantLimits(), "async+memory://", BoundedNames(10))


async def spend(
    quotas: Quotas, who: Principal, estimate: int = 1, used: int | None = None
) -> dict[str, str]:
    async with quotas.spend(who, estimate) as spending:
        headers = dict(spending.headers)
        await quotas.settle(spending, estimate if used is None else used)
    return headers


async def test_requests_per_minute_come_in_bursts_of_a_sixth_but_ten(quotas: Quotas) -> None:
    for name, per_minute, at_once in (("few", 30, 10), ("many", 600, 100)):
        for left in range(at_once):
            headers = await spend(quotas, caller(name, requests_per_minute=per_minute))
            assert headers["x-ratelimit-remaining-requests"] == str(per_minute - left - 1)
        with pytest.raises(RateLimited, match=f"limit of {per_minute} requests per minute"):
            await spend(quotas, caller(name, requests_per_minute=per_minute))
    assert await spend(quotas, caller("another", requests_per_minute=30))


async def test_a_minutes_requests_are_counted_beside_the_bursts(quotas: Quotas) -> None:
    for _ in range(3):
        await spend(quotas, caller(requests_per_minute=3))
    with pytest.raises(RateLimited) as caught:
        await spend(quotas, caller(requests_per_minute=3))
    assert 1 <= caught.value.retry_after <= 61
    assert caught.value.headers["x-ratelimit-remaining-requests"] == "0"


async def test_tokens_are_taken_as_estimated_and_settled_as_used(quotas: Quotas) -> None:
    who = caller(tokens_per_minute=100)
    assert (await spend(quotas, who, 60, used=10))["x-ratelimit-remaining-tokens"] == "40"
    assert (await spend(quotas, who, 60, used=85))["x-ratelimit-remaining-tokens"] == "30"
    with pytest.raises(RateLimited, match="100 tokens per minute"):  # 95 are used
        await spend(quotas, who, 6)
    assert (await spend(quotas, who, 5))["x-ratelimit-remaining-tokens"] == "0"


async def test_what_is_refused_takes_no_tokens_anywhere(quotas: Quotas) -> None:
    """The tenant's bucket has been charged by the time the key's refuses."""
    key = {"tokens_per_minute": 10}
    with pytest.raises(RateLimited, match="limit of 10 tokens"):
        await spend(quotas, caller(key=key, tokens_per_minute=100), 50)
    headers = await spend(quotas, caller(tokens_per_minute=100), 1)
    assert int(headers["x-ratelimit-remaining-tokens"]) >= 98


async def test_of_tenant_and_key_the_tighter_limit_is_in_the_headers(quotas: Quotas) -> None:
    headers = await spend(quotas, caller(key={"tokens_per_minute": 50}, tokens_per_minute=1000), 10)
    assert headers["x-ratelimit-limit-tokens"] == "50"
    assert headers["x-ratelimit-remaining-tokens"] == "40"
    limits = quotas.limits(caller(key={"tokens_per_minute": 50}, tokens_per_minute=20))
    assert limits.tokens_per_minute == 20


async def test_a_place_is_given_back_however_the_block_ends(quotas: Quotas) -> None:
    who = caller(concurrent_requests=1)

    async def failing() -> None:
        async with quotas.spend(who, 1):
            with pytest.raises(RateLimited, match="1 requests at once"):
                await spend(quotas, who)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        await failing()
    assert await spend(quotas, who) == {}
    with pytest.raises(RateLimited):  # refused by another limit, after the place was taken
        await spend(quotas, caller(concurrent_requests=1, tokens_per_minute=1), 2)
    assert await spend(quotas, who) == {}


async def test_a_place_is_given_back_by_a_request_that_is_cancelled(quotas: Quotas) -> None:
    who = caller(concurrent_requests=1)

    async def hold() -> None:
        async with quotas.spend(who, 1):
            await asyncio.sleep(60)

    holding = asyncio.create_task(hold())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
    assert await spend(quotas, who) == {}


async def test_tokens_of_several_minutes_hold_the_bucket_for_as_many(quotas: Quotas) -> None:
    who = caller(tokens_per_minute=10)
    await spend(quotas, who, 1, used=35)
    storage = quotas._storage
    assert isinstance(storage, MemoryStorage)
    (key,) = [key for key in storage.expirations if "reft-tokens" in key]
    with pytest.raises(RateLimited) as caught:
        await spend(quotas, who)
    assert 150 < caught.value.retry_after < 181
    assert storage.storage[key] == 35


async def test_management_requests_are_limited_except_of_admins(quotas: Quotas) -> None:
    who = caller(management_requests_per_minute=1)
    await quotas.take_management(who)
    with pytest.raises(RateLimited):
        await quotas.take_management(who)
    admin = Principal("t1", "t1", "k1", "admin", frozenset({"admin"}), "", who.limits, {}, None)
    await quotas.take_management(admin)


async def test_what_cannot_be_counted_is_refused_and_leaves_no_place_taken(
    quotas: Quotas, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = caller(concurrent_requests=1, tokens_per_minute=10)

    async def away(*_: Any, **__: Any) -> bool:
        raise StorageError(OSError("away"))

    with monkeypatch.context() as patch:
        patch.setattr(quotas._tokens, "test", away)
        with pytest.raises(DatabaseUnusable):
            await spend(quotas, who)
    assert await spend(quotas, who)


async def test_a_clock_that_is_set_back_begins_to_count_anew(quotas: Quotas) -> None:
    who = caller(tokens_per_minute=10)
    await spend(quotas, who, 10)
    with pytest.raises(RateLimited):
        await spend(quotas, who)
    quotas._ahead += 3600
    assert await spend(quotas, who)


def test_a_storage_that_is_no_url_is_refused_without_its_password() -> None:
    with pytest.raises(ServiceError) as caught:
        Quotas(TenantLimits(), "nonsense://:secret@host", BoundedNames(10))
    assert "secret" not in str(caught.value)
