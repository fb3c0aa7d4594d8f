"""A streamed answer and a caller that leaves, as ASGI messages, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from reft_serve.gateway.http.streaming import ClientGone, Streamed, while_there

pytestmark = pytest.mark.anyio
Emit = Callable[[bytes], Awaitable[None]]


class Caller:
    """Keeps what is sent to it; `leave` is what its server notices."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self._gone = asyncio.Event()
        self.watchers = 0

    def leave(self) -> None:
        self._gone.set()

    async def receive(self) -> dict[str, Any]:
        self.watchers += 1
        try:
            await self._gone.wait()
        finally:
            self.watchers -= 1
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def complete(self) -> bool:
        return bool(self.sent) and self.sent[-1].get("more_body") is False


def streamed(relay: Callable[[Emit], Awaitable[None]]) -> tuple[Streamed, list[str]]:
    ends: list[str] = []

    async def finish() -> None:
        ends.append("finished")

    return Streamed(relay, {"x-request-id": "r1"}, finish), ends


async def test_events_are_sent_as_they_come_and_end_the_body() -> None:
    async def relay(emit: Emit) -> None:
        await emit(b"data: 1\n\n")
        assert caller.body == b"data: 1\n\n"
        await emit(b"data: 2\n\n")

    caller = Caller()
    response, ends = streamed(relay)
    await response({}, caller.receive, caller.send)
    assert caller.body == b"data: 1\n\ndata: 2\n\n"
    assert caller.complete
    headers = dict(caller.sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"x-request-id"] == b"r1"
    assert b"content-length" not in headers
    assert ends == ["finished"]
    assert caller.watchers == 0


async def test_a_caller_that_leaves_cancels_the_work_once_and_it_may_clean_up() -> None:
    cleaned = []

    async def relay(emit: Emit) -> None:
        await emit(b"data: 1\n\n")
        caller.leave()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)  # a second cancellation would end this
            cleaned.append(True)

    caller = Caller()
    response, ends = streamed(relay)
    await response({}, caller.receive, caller.send)
    assert (cleaned, ends, caller.complete) == ([True], ["finished"], False)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_relay_that_fails_is_finished_and_its_failure_is_told() -> None:
    async def relay(emit: Emit) -> None:
        await emit(b"data: 1\n\n")
        raise RuntimeError("broken")

    caller = Caller()
    response, ends = streamed(relay)
    with pytest.raises(RuntimeError, match="broken"):
        await response({}, caller.receive, caller.send)
    assert (ends, caller.complete, caller.watchers) == (["finished"], False, 0)


async def test_a_block_that_ends_by_itself_is_not_cancelled() -> None:
    caller = Caller()
    async with while_there(caller.receive):
        pass
    caller.leave()
    await asyncio.sleep(0)
    assert caller.watchers == 0


@pytest.mark.parametrize("leaves", [False, True], ids=["the caller stays", "the caller leaves"])
async def test_the_servers_own_cancellation_is_not_the_callers(leaves: bool) -> None:
    async def work() -> None:
        async with while_there(caller.receive):
            await asyncio.sleep(60)

    caller = Caller()
    working = asyncio.create_task(work())
    await asyncio.sleep(0.01)
    if leaves:
        caller.leave()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert caller.watchers == 0


async def test_a_block_knows_that_its_caller_has_left() -> None:
    caller = Caller()
    caller.leave()
    with pytest.raises(ClientGone):
        async with while_there(caller.receive):
            await asyncio.sleep(60)
