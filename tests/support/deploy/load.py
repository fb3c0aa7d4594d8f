"""Callers that never stop asking and never try again: every answer that is not whole and right is a
failure.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

TOKENS = 8


@dataclass
class Tally:
    """What the callers have seen."""

    done: int = 0
    failures: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, failure: str | None) -> None:
        with self._lock:
            self.done += 1
            if failure is not None:
                self.failures.append(failure)

    def grow(self, by: int, seconds: float = 30.0) -> None:
        """Wait until so many more requests have been answered."""
        target, deadline = self.done + by, time.monotonic() + seconds
        while self.done < target:
            assert time.monotonic() < deadline, f"requests do not get through: {self.failures[:3]}"
            time.sleep(0.02)


@contextmanager
def asking(url: str, key: list[str], models: list[str], callers: int = 6) -> Iterator[Tally]:
    """Callers with connections that they keep, some streaming. `key[0]` is the key that they use;
    it may be exchanged.
    """
    tally, ending = Tally(), threading.Event()

    def call(number: int) -> None:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            for count in range(10**6):
                if ending.is_set():
                    return
                tally.note(
                    _ask(
                        client,
                        key[0],
                        models[(number + count) % len(models)],
                        stream=number % 2 == 0,
                    )
                )

    threads = [
        threading.Thread(target=call, args=(number,), daemon=True) for number in range(callers)
    ]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        ending.set()
        for thread in threads:
            thread.join(40)


def _ask(client: httpx.Client, key: str, model: str, *, stream: bool) -> str | None:
    body = {"model": model, "prompt": "x", "max_tokens": TOKENS, "stream": stream}
    begun = time.strftime("%H:%M:%S")
    try:
        answer = client.post(
            "/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}
        )
    except httpx.HTTPError as exc:
        return f"{begun} {exc!r}"
    if answer.status_code != 200:
        return f"{begun} {answer.status_code} {answer.text[:200]}"
    if stream:
        whole = answer.text.endswith("data: [DONE]\n\n") and answer.text.count('"text"') == TOKENS
    else:
        whole = answer.json()["usage"]["completion_tokens"] == TOKENS
    return None if whole else f"{begun} not whole: {answer.text[-300:]}"
