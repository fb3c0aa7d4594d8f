"""Checks of uploads: given in turn, and ended with their callers, their gateway and their
limits.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from reft_serve.errors import DataInvalid, RateLimited, RequestInvalid
from reft_serve.gateway.uploads import subprocess_check
from reft_serve.gateway.uploads.checking import CHECKS_WAITING_PER_TENANT, CheckPlaces
from reft_serve.gateway.uploads.subprocess_check import check_in_subprocess
from tests.support.gateway.harness import running
from tests.support.gateway.process import Process
from tests.support.waiting import wait_for

pytestmark = pytest.mark.anyio
GOOD = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def children(pid: int) -> set[int]:
    """The processes of checks that this process has begun, once they run Python."""
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    found = {int(child) for task in listed for child in task.read_text().split()}
    return {
        child
        for child in found
        if lives(child) and b"subprocess_check" in Path(f"/proc/{child}/cmdline").read_bytes()
    }


def lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@asynccontextmanager
async def checks(
    places: CheckPlaces, tenant: str, count: int, log: list[str]
) -> AsyncIterator[list[asyncio.Task[None]]]:
    async def check() -> None:
        async with places.place(tenant):
            log.append(tenant)
            await asyncio.sleep(0.01)

    tasks = [asyncio.create_task(check()) for _ in range(count)]
    await asyncio.sleep(0)
    yield tasks
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_tenant_with_many_checks_has_one_place_and_others_come_between() -> None:
    places, log = CheckPlaces(at_once=2), list[str]()
    async with (
        checks(places, "many", 6, log),
        checks(places, "few", 1, log),
        checks(places, "other", 2, log),
    ):
        assert log == ["many", "few"]
    assert sorted(log) == ["few"] + ["many"] * 6 + ["other"] * 2
    assert log.index("other") <= 3


async def test_the_longest_unserved_tenant_is_next() -> None:
    places, log = CheckPlaces(at_once=1), list[str]()
    async with checks(places, "many", 4, log), checks(places, "late", 1, log):
        pass
    assert log == ["many", "late", "many", "many", "many"]


async def test_a_check_that_is_cancelled_gives_its_place_back_waiting_or_not() -> None:
    places, log = CheckPlaces(at_once=1), list[str]()
    async with checks(places, "a", 3, log) as tasks:
        tasks[0].cancel()
        tasks[1].cancel()
    assert log == ["a", "a"]
    async with checks(places, "b", 1, log):
        pass
    assert log[-1] == "b"


async def test_too_many_that_wait_are_refused() -> None:
    places, log = CheckPlaces(at_once=1), list[str]()
    async with checks(places, "a", CHECKS_WAITING_PER_TENANT + 1, log):
        with pytest.raises(RateLimited):
            async with places.place("a"):
                pass
        async with checks(places, "b", 1, log):
            pass
    assert len(log) == CHECKS_WAITING_PER_TENANT + 2


async def _check(content: bytes, **limits: Any) -> dict[str, Any]:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return await check_in_subprocess(
            "data file", {"where": "x", "limits": limits}, file.fileno(), len(content)
        )


async def test_a_check_in_a_process_finds_what_one_here_finds() -> None:
    assert await _check(GOOD * 3) == {"format": "completion", "rows": 3}
    with pytest.raises(DataInvalid, match="line 1: is not JSON"):
        await _check(b"?")


async def test_a_check_that_takes_too_much_memory_is_refused() -> None:
    row = (
        b'{"prompt": "a", "completion": "' + b"x" * 60_000_000 + "\U0001f600".encode() + b'"}'
    )  # four bytes a character
    with pytest.raises(RequestInvalid, match="too much memory"):
        await _check(row, row_bytes=1 << 27)


async def test_a_check_ends_at_its_limit_of_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess_check, "CHECK_SECONDS", 1)
    monkeypatch.setattr(subprocess_check, "CHECK_SECONDS_PER_MIB", 0)
    with pytest.raises(RequestInvalid, match="more than 1 seconds of processor time"):
        await _check(b"{}\n" * 2_000_000)


async def test_a_check_that_is_cancelled_has_ended_when_its_caller_goes_on() -> None:
    check = asyncio.create_task(_check(b"{}\n" * 5_000_000))
    while not (running := children(os.getpid())):
        await asyncio.sleep(0.05)
    check.cancel()
    with pytest.raises(asyncio.CancelledError):
        await check
    assert not any(map(lives, running))


def _half_a_request(tenant_key: str, port: int, content: bytes) -> socket.socket:
    body = (
        b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b\r\n'
        b'content-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        + content
        + b"\r\n--b--\r\n"
    )
    head = (
        "POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
        f"{tenant_key}\r\ncontent-length: {len(body)}\r\ncontent-type: multipart/form-data; "
        "boundary=b\r\n\r\n"
    )
    caller = socket.create_connection(("127.0.0.1", port))
    caller.sendall(head.encode() + body)
    return caller


def test_a_check_ends_within_a_second_of_its_caller_and_of_its_gateway(tmp_path: Path) -> None:
    slow = b"{}\n" * 3_000_000
    with running(tmp_path) as (gateway, _):  # only to make the database, a tenant and a key
        tenant = gateway.tenant("acme")
    process = Process(tmp_path)
    try:
        caller = _half_a_request(tenant.key, process.port, slow)
        wait_for(lambda: children(process.process.pid), 30)
        (first,) = children(process.process.pid)
        caller.close()
        wait_for(lambda: not lives(first), 5)
        with _half_a_request(tenant.key, process.port, slow):
            wait_for(lambda: children(process.process.pid), 30)
            (second,) = children(process.process.pid)
            process.kill()
            wait_for(lambda: not lives(second), 5)
    finally:
        if process.process.poll() is None:
            process.kill()
