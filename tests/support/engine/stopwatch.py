"""How long an engine core's loop is held up by each message that may load an adapter.

vLLM imports its `scheduler_cls` in the core's own process; naming the one of this module puts the
stopwatch on.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sized
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc

from reft_serve.engine.core.admission import admission_of


class WatchedScheduler(Scheduler):
    """vLLM's own."""


def tables(owner: Any) -> list[Sized]:
    """The collections that an object keeps: what they hold together must not grow with loads."""
    return [value for value in vars(owner).values() if isinstance(value, dict | set | list | deque)]


def resident_bytes() -> int:
    """This process's resident set."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


_handle = EngineCoreProc._handle_client_request
_spent: dict[str, list[float]] = {"call": [], "request": []}


def _timed(self: Any, request_type: Any, request: Any) -> None:
    started = time.perf_counter()
    _handle(self, request_type, request)
    seconds = time.perf_counter() - started
    if request_type is EngineCoreRequestType.ADD:
        _spent["request"].append(seconds)
    elif request_type is EngineCoreRequestType.UTILITY and request[2] == "add_lora":
        _spent["call"].append(seconds)


def _stopwatch(self: Any) -> dict[str, Any]:
    """The seconds of each message since the last call, the core's memory, and the entries of our
    own collections in it.
    """
    given = {kind: list(seconds) for kind, seconds in _spent.items()}
    for seconds in _spent.values():
        seconds.clear()
    admission = admission_of(self)
    entries = sum(map(len, tables(admission))) if admission is not None else 0
    return given | {"resident_bytes": resident_bytes(), "entries": entries}


EngineCoreProc._handle_client_request = _timed
EngineCoreProc.stopwatch = _stopwatch
