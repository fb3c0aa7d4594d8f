"""Requests that were in an engine when it ended, so that none of them ends one engine after
another.

A request that was alone in the engine is not delivered again, neither by the gateway nor if its
caller repeats it. One that was there in the company of others may be an innocent: if it is plain it
is delivered once more, and quarantined if it meets a second end.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from reft_serve.errors import RateLimited, RequestQuarantined

__all__ = [
    "LONE_ENDS",
    "PLAIN_BYTES",
    "QUARANTINE_ENTRIES",
    "QUARANTINE_SECONDS",
    "WINDOW_SECONDS",
    "Quarantine",
    "digest_of",
    "is_plain",
]

QUARANTINE_SECONDS = 3600
QUARANTINE_ENTRIES = 1000
# A tenant whose requests were so often alone in an engine that ended, in this window, has to wait.
LONE_ENDS = 3
WINDOW_SECONDS = 600
PLAIN_BYTES = 65_536
# They change nothing of what an engine computes, so that no caller makes a new request of an old
# one by them.
_IRRELEVANT = frozenset({"user", "metadata", "stream", "stream_options"})
_PLAIN = _IRRELEVANT | {
    "model",
    "prompt",
    "messages",
    "input",
    "instructions",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "n",
    "ignore_eos",
    "encoding_format",
    "logprobs",
}


@dataclass(slots=True)
class _Suspect:
    ends: int
    until: float


class Quarantine:
    """Records of engine crashes and quarantined requests of this gateway."""

    def __init__(self) -> None:
        self._suspects: dict[str, OrderedDict[str, _Suspect]] = {}
        self._present: dict[str, deque[float]] = {}
        self._alone: dict[str, deque[float]] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def check(self, tenant: str, path: str, body: Mapping[str, Any]) -> None:
        """Costs next to nothing for a tenant whose requests were in no engine that ended.

        Raises:
            RequestQuarantined: engines ended because of this request, as far as can be known.
            RateLimited: too many engines ended with nothing in them except a request of this
                tenant.
        """
        alone = _recent(self._alone, tenant)
        if len(alone) >= LONE_ENDS:
            wait = alone[0] + WINDOW_SECONDS - time.monotonic()
            raise RateLimited(
                f"{len(alone)} engines crashed while processing only a request of this tenant; "
                f"try again in {wait:.0f} s",
                wait,
            )
        if self._suspects.get(tenant):
            self.check_digest(tenant, digest_of(tenant, path, body))

    def check_digest(self, tenant: str, digest: str) -> None:
        """The same for a digest: of a request, or of an adapter's version.

        Raises:
            RequestQuarantined: engines ended because of it.
        """
        now = time.monotonic()
        suspects = self._suspects.get(tenant)
        suspect = suspects.get(digest) if suspects else None
        if suspect is not None and suspect.ends > 1 and suspect.until > now:
            minutes = max(1, round((suspect.until - now) / 60))
            raise RequestQuarantined(
                "an engine ended while it processed this request or loaded its adapter, so the "
                "request is not accepted again: change it, or ask the operator; the quarantine "
                f"ends in {minutes} min"
            )

    def note(self, tenant: str, digest: str, *, alone: bool) -> bool:
        """Note that an engine ended with this request; returns whether the request is quarantined
        from now on.
        """
        now = time.monotonic()
        _add(self._present, tenant, now)
        if alone:
            _add(self._alone, tenant, now)
        self._forget(now)
        return self.suspect(tenant, digest, alone=alone)

    def suspect(self, tenant: str, digest: str, *, alone: bool) -> bool:
        """The same, of an end that is noted already: `digest` is what the request used."""
        now = time.monotonic()
        suspects = self._suspects.setdefault(tenant, OrderedDict())
        known = suspects.pop(digest, None)
        ends = (known.ends if known is not None and known.until > now else 0) + (2 if alone else 1)
        suspects[digest] = _Suspect(ends, now + QUARANTINE_SECONDS)
        if len(suspects) > QUARANTINE_ENTRIES:
            suspects.popitem(last=False)
        return ends > 1

    def clear(self, tenant: str, path: str, body: Mapping[str, Any]) -> None:
        """Note that a request was answered: if it was a suspect, another request ended the
        engine.
        """
        suspects = self._suspects.get(tenant)
        if suspects:
            digest = digest_of(tenant, path, body)
            if digest in suspects and suspects[digest].ends == 1:
                del suspects[digest]

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Hold the turn of a suspect: of a tenant that was there at many ends, one at a time is
        delivered again.
        """
        if len(_recent(self._present, tenant)) < LONE_ENDS:
            yield
            return
        lock = self._turns.setdefault(tenant, asyncio.Lock())
        async with lock:
            yield

    def _forget(self, now: float) -> None:
        """Drop tenants without records. Crashes are rare, so all tenants are scanned."""
        for suspects in self._suspects.values():
            while suspects and next(iter(suspects.values())).until < now:
                suspects.popitem(last=False)
        self._suspects = {
            tenant: suspects for tenant, suspects in self._suspects.items() if suspects
        }
        for times in (self._present, self._alone):
            for tenant in [tenant for tenant in times if not _recent(times, tenant)]:
                del times[tenant]


def digest_of(tenant: str, path: str, body: Mapping[str, Any]) -> str:
    """Digest of a tenant's request, regardless of the order of its fields."""
    kept = {name: value for name, value in body.items() if name not in _IRRELEVANT}
    return hashlib.sha256(json.dumps([tenant, path, kept], sort_keys=True).encode()).hexdigest()


def is_plain(body: Mapping[str, Any], size: int) -> bool:
    """True if a request has no feature that crashed engines before: structured outputs, tools,
    unusual sampling.
    """
    return body.keys() <= _PLAIN and size <= PLAIN_BYTES and (body.get("n") or 1) == 1


def _recent(times: Mapping[str, deque[float]], tenant: str) -> Sequence[float]:
    """A tenant's moments of the window; the older ones are forgotten."""
    moments = times.get(tenant)
    if moments is None:
        return ()
    since = time.monotonic() - WINDOW_SECONDS
    while moments and moments[0] < since:
        moments.popleft()
    return moments


def _add(times: dict[str, deque[float]], tenant: str, now: float) -> None:
    times.setdefault(tenant, deque(maxlen=QUARANTINE_ENTRIES)).append(now)
