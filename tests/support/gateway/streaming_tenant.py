"""A tenant that sends streams at random moments. It imports little: it may be a process of its
own.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections import Counter
from collections.abc import AsyncIterator

import aiohttp

TOKENS = 32


async def arrivals(rate: float, until: float) -> AsyncIterator[float]:
    """The moments of a Poisson process, each given when it has come."""
    due = time.perf_counter()
    while rate:
        due += random.expovariate(rate)
        if due >= until:
            return
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield due


async def stream(
    client: aiohttp.ClientSession, url: str, key: str, due: float
) -> tuple[int, float]:
    """(status, seconds from `due` to the first event)."""
    body = {
        "model": "base",
        "prompt": "Once upon a time",
        "max_tokens": TOKENS,
        "stream": True,
        "ignore_eos": True,
    }
    headers = {"authorization": f"Bearer {key}"}
    async with client.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
        await answer.content.readany()
        first = time.perf_counter() - due
        await answer.read()
        return answer.status, first


def tenant(url: str, key: str, rate: float, until: float) -> tuple[Counter[int], list[float]]:
    """One tenant's life until then: its answers by status, and the seconds to the first event of
    those that were given.
    """
    gc.freeze()
    return asyncio.run(_tenant(url, key, rate, until))


async def _tenant(
    url: str, key: str, rate: float, until: float
) -> tuple[Counter[int], list[float]]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        sent = []
        async for due in arrivals(rate, until):
            sent.append(asyncio.create_task(stream(client, url, key, due)))
        answers = await asyncio.gather(*sent)
    return Counter(status for status, _ in answers), [
        first for status, first in answers if status == 200
    ]
