"""Schemathesis on a gateway process, at length: requests made from its OpenAPI document, sound
(positive), unsound (negative) and in sequences (stateful), until there have been enough. Any answer
that is a 5xx, or not what the document says, ends the run with the request that shows it.

The gateway is a process of its own over a real SQLite file and store; its engine is the fake one.

  scripts/bench openapi --cases 20000
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
import time
from pathlib import Path

import httpx
from rich.console import Console

from benchmarks._report import save
from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Served
from tests.support.gateway.openapi_judge import ROTATION, furnish, judge
from tests.support.gateway.process import process


def main() -> None:
    """Run until there have been enough cases, print what was seen, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument(
        "--examples", type=int, default=30, help="per operation, phase and mode, in one round"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    console, begun = Console(), time.perf_counter()
    engine = FakeEngine(remember=False)
    served = Served(engine.app)
    rounds: list[dict[str, int]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = Gateway(folder, served.url)  # makes the database and a key, and ends
        prepared.stop()
        with (
            process(
                folder,
                served.url,
                REFT_LOG_LEVEL="WARNING",
                REFT_WEBHOOKS_TO_PRIVATE_ADDRESSES="true",
            ) as (
                gateway,
                url,
            ),
            httpx.Client(
                base_url=url,
                headers={"authorization": f"Bearer {prepared.admin_key}"},
                trust_env=False,
            ) as admin,
        ):
            operations = sum(
                len(path) for path in admin.get("/openapi.json").json()["paths"].values()
            )
            while sum(judged["cases"] for judged in rounds) < args.cases:
                known, seed = furnish(admin), args.seed + len(rounds)
                cases = judge(
                    url,
                    prepared.admin_key,
                    args.examples,
                    folder,
                    known,
                    "--exclude-path-regex",
                    ROTATION,
                    seed=seed,
                )
                assert admin.get("/v1/tenant").status_code == 200, (
                    "the key died, so what came after shows nothing"
                )
                spare = admin.post("/v1/keys", json={"role": "admin"}).json()["secret"]
                cases += judge(
                    url,
                    spare,
                    args.examples,
                    folder,
                    known,
                    "--include-path-regex",
                    ROTATION,
                    seed=seed,
                )
                rounds.append({"seed": seed, "cases": cases})
                total = sum(judged["cases"] for judged in rounds)
                console.print(
                    f"{total} cases of {operations} operations: no 5xx, no answer that the "
                    "document does not tell"
                )
            assert gateway.poll() is None
        errors = [
            line for line in (folder / "gateway.log").read_text().splitlines() if '"error"' in line
        ]
    served.stop()
    assert not errors, errors[:5]
    save(
        "openapi",
        {
            "arguments": vars(args),
            "schemathesis": importlib.metadata.version("schemathesis"),
            "seconds": round(time.perf_counter() - begun),
            "operations": operations,
            "cases": sum(judged["cases"] for judged in rounds),
            "server_errors": 0,
            "contract_breaks": 0,
            "rounds": rounds,
        },
    )


if __name__ == "__main__":
    main()
