"""Whether the gateway keeps anything of the requests that it has answered: its resident memory
while they pass.

Streams, whole answers and Prometheus' scrapes go through a gateway as it runs by default, each
request logged and counted in SQLite, to the fake engine, which answers at once. Memory grows while
pools and caches fill, and is to stay where it is from then on, however many requests come.

  scripts/bench gateway_memory
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from benchmarks._report import save
from benchmarks.gateway import Arm, Connection, fake_engine, first_key
from tests.support.gateway.process import free_port, listening

_STREAMED, _SCRAPES, _CONNECTIONS, _TOKENS = 2 / 3, 100, 4, 4


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def ask(arm: Arm, requests: int, *, stream: bool) -> None:
    """So many requests over a few connections."""
    waiting = iter(range(requests))

    async def one() -> None:
        async with Connection.to(arm) as connection:
            for _ in waiting:
                await connection.ask(_TOKENS, stream=stream)

    await asyncio.gather(*(one() for _ in range(_CONNECTIONS)))


async def measure(arm: Arm, reader: str, gateway: int, rounds: int, requests: int) -> list[float]:
    """MB of the gateway's process before the first round and after each."""
    resident_mb = [resident(gateway) / 1e6]
    async with httpx.AsyncClient(
        base_url=f"http://{arm.host}:{arm.port}", trust_env=False
    ) as scraper:
        for _ in range(rounds):
            streamed = int(requests * _STREAMED)
            await ask(arm, streamed, stream=True)
            await ask(arm, requests - streamed, stream=False)
            for _ in range(_SCRAPES):
                answer = await scraper.get(
                    "/metrics", headers={"authorization": f"Bearer {reader}"}
                )
                answer.raise_for_status()
            resident_mb.append(resident(gateway) / 1e6)
            Console().print(
                f"{requests * (len(resident_mb) - 1):,} requests: {resident_mb[-1]:.1f} MB"
            )
    return resident_mb


def main() -> None:
    """Run the benchmark, write JSON and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=3000, help="of each round")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        engine, port, database = free_port(), free_port(), f"sqlite:///{Path(folder) / 'reft.db'}"
        stack.enter_context(listening(fake_engine(engine, 0.0), engine))
        key, reader = (asyncio.run(first_key(database, role)) for role in ("inference", "metrics"))
        settings = {
            "REFT_DATABASE": database,
            "REFT_STORE": folder,
            "REFT_ENGINES": f"http://127.0.0.1:{engine}",
        }
        command = [sys.executable, "-m", "reft_serve.cli.gateway", "--port", str(port)]
        pid = stack.enter_context(listening(command, port, **settings))
        arm = Arm("gateway", "127.0.0.1", port, "base", key)
        resident_mb = asyncio.run(measure(arm, reader, pid, args.rounds, args.requests))
    save(
        "gateway-memory",
        {"arguments": vars(args), "resident_mb": [round(each, 2) for each in resident_mb]},
        _plot,
    )


def _plot(result: dict[str, Any], axes: Any) -> None:
    resident_mb, requests = result["resident_mb"], result["arguments"]["requests"]
    axes.plot(
        [requests * k / 1000 for k in range(len(resident_mb))], resident_mb, "o-", color="#00897b"
    )
    axes.set_ylim(0, 1.2 * max(resident_mb))
    axes.set_xlabel("thousand requests")
    axes.set_ylabel("resident MB of the gateway")


if __name__ == "__main__":
    main()
