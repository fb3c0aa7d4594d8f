"""kill -9 in the middle of streams, again and again: the gateway, the engine, every connection to the database.

Each round begins 200 streams, of the base model and of an adapter, ends one of the three when a random share of their tokens
has come, starts it again, and judges every stream and the ledger: a piece of an answer that is not the undisturbed one's, a
request that is not counted, is counted twice, or with other tokens than its caller had, an admission that stays open, a
request that the engine works on for nobody. Recovery is the time from the kill until both models are answered again, the
process's own start included. (SQLite has no connections: there a process dies in the middle of a transaction that holds the
lock, after half a second.) One fault ends the run with status 1.

The engine is the fake one, or vLLM with the shipped model, greedy and in float32. There its core is killed alone, too, and
the server ends by itself. `undecided` are its answers that went their own way where two tokens were as good as equal.

  scripts/bench chaos                         SQLite
  scripts/bench chaos --database postgres     a private PostgreSQL, from Debian's packages
  scripts/bench chaos --engine real --kills 5 --streams 40
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._report import save
from tests.support.killing.killable import FAKE, REAL
from tests.support.killing.rounds import Round, scene
from tests.support.postgres import create_database, postgres_server

ENDS = ("whole", "failed", "refused", "cut")


def main() -> None:
    """Run the rounds, print what was seen, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--engine", choices=("fake", "real"), default="fake")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started ends, too
    chance = random.Random(args.seed)
    rounds: dict[str, list[Round]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        database = f"sqlite:///{folder / 'reft.db'}"
        if args.database == "postgres":
            database = create_database(stack.enter_context(postgres_server()), "chaos")
        running = stack.enter_context(
            scene(folder, database, FAKE if args.engine == "fake" else REAL)
        )
        kills: dict[str, Callable[[], None]] = {
            "gateway": running.gateway.kill, "engine": running.engine.kill, "database": running.cut_connections
        }  # fmt: skip
        if args.engine == "real":
            kills["engine's core"] = running.engine.kill_core
        for _ in range(2):  # the first one's answers are the measure of all others
            undisturbed = asyncio.run(running.play(args.streams, None, 0))
            assert undisturbed.ended == {"whole": args.streams}, undisturbed
            assert not undisturbed.faults, undisturbed
        for _ in range(args.kills):
            for name, kill in kills.items():
                rounds.setdefault(name, []).append(
                    asyncio.run(running.play(args.streams, kill, chance.uniform(0, 0.9)))
                )
                Console().print(name, dict(rounds[name][-1].ended), *rounds[name][-1].faults[:3])
    result = {
        "arguments": vars(args),
        "killed": {name: _summary(each) for name, each in rounds.items()},
    }
    _print(result["killed"])
    parts = [
        "chaos",
        *(["postgres"] if args.database == "postgres" else []),
        *(["real"] if args.engine == "real" else []),
    ]
    save("-".join(parts), result)
    if any(each.faults for some in rounds.values() for each in some):
        raise SystemExit(1)


def _summary(rounds: list[Round]) -> dict[str, Any]:
    recoveries = [each.recovery_seconds for each in rounds]
    return {
        "kills": len(rounds),
        "streams": dict(sum((each.ended for each in rounds), Counter[str]())),
        "undecided": sum(each.undecided for each in rounds),
        "faults": [fault for each in rounds for fault in each.faults],
        "recovery_seconds": {"median": statistics.median(recoveries), "largest": max(recoveries)},
    }


def _print(killed: dict[str, Any]) -> None:
    table = Table("killed", "times", *ENDS, "faults", "recovery s", "at most")
    for name, each in killed.items():
        ends = (f"{each['streams'].get(end, 0):,}" for end in ENDS)
        recovery = (f"{each['recovery_seconds'][which]:.1f}" for which in ("median", "largest"))
        table.add_row(name, str(each["kills"]), *ends, str(len(each["faults"])), *recovery)
    Console().print(table)


if __name__ == "__main__":
    main()
