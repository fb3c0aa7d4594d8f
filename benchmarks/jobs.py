"""Fine-tuning jobs while workers, the gateway and the database are killed every few seconds: what
must hold, and did.

50 jobs of 5 tenants, 3 workers; every tenth job is cancelled on its way, another tenth paused and
resumed. `kill -9` of a random worker or gateway, of every connection to PostgreSQL, or of one of
its backends, after which it recovers; SQLite's write lock is held instead. Then: every job has
ended once, no two processes trained one job at once, the weights are those of undisturbed runs bit
for bit, every version answers through the gateway, and no file is left that no row names.

  scripts/bench jobs                        on SQLite and on PostgreSQL
  scripts/bench jobs --database sqlite --jobs 6
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks._report import save
from reft_serve.database.connection import Database
from reft_serve.database.migrations.schema import migrate
from tests.support.postgres import postgres_server
from tests.support.training.chaos import Chaos, Tally
from tests.support.training.jobs import QUICK, Place


async def trial(args: argparse.Namespace, folder: Path, url: str) -> dict[str, Any]:
    """One run on one database."""
    database = Database(url)
    await migrate(database)
    settings = QUICK | {"n_epochs": args.epochs}
    chaos = Chaos(
        Place(folder, database, url), seed=args.seed, kinds=args.kinds, hyperparameters=settings
    )
    try:
        await chaos.undisturbed()
        await chaos.ask(args.tenants, args.jobs)
        async with chaos.processes(args.workers):
            await chaos.run((args.least, args.most), args.seconds)
            await chaos.judge()
        assert await chaos.leftovers() == []
        return _told(chaos.tally, await chaos.events())
    finally:
        await database.close()


def _told(tally: Tally, events: int) -> dict[str, Any]:
    plain = {field.name: getattr(tally, field.name) for field in fields(tally)}
    return plain | {"ended": dict(tally.ended), "kills": dict(tally.kills), "events": events}


async def new_database(server: str) -> str:
    """A database of a server's, with nothing in it."""
    name = f"jobs_{secrets.token_hex(6)}"
    engine = create_async_engine(
        server.replace("postgresql://", "postgresql+asyncpg://"), isolation_level="AUTOCOMMIT"
    )
    async with engine.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name}"))
    await engine.dispose()
    return f"{server.rpartition('/')[0]}/{name}"


def main() -> None:
    """Run, print what was seen, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--database", choices=["sqlite", "postgresql", "both"], default="both")
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--tenants", type=int, default=5)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument(
        "--kinds",
        type=int,
        default=10,
        help="different jobs; the rest repeat them for other tenants",
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--least", type=float, default=2.0, help="seconds between kills, at least")
    parser.add_argument("--most", type=float, default=6.0, help="seconds between kills, at most")
    parser.add_argument(
        "--seconds", type=float, default=1200.0, help="a run that takes longer has failed"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tag", help="suffix of the result's file name")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started ends, too
    results = {}
    for kind in ("sqlite", "postgresql") if args.database == "both" else (args.database,):
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name).resolve()
            if kind == "sqlite":
                url = f"sqlite:///{folder / 'reft.db'}"
            else:
                url = asyncio.run(new_database(stack.enter_context(postgres_server())))
            results[kind] = asyncio.run(trial(args, folder, url))
        Console().print(kind, results[kind])
    save(
        "jobs" if args.tag is None else f"jobs-{args.tag}",
        {"arguments": vars(args), "databases": results},
    )


if __name__ == "__main__":
    main()
