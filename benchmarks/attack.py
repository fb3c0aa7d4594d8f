"""A hostile tenant beside a well-behaved one, against `reft-serve up` with the demo model.

The hostile tenant has keys of the roles inference and owner. It does every attack of tests/support/attacks.py in random order
and with random sizes: headers, idle and slow connections, wrong bodies, JSON, archives, adapters, data files, schemas,
grammars, prompts, uploads that stop, event streams, lists, keys, webhooks, jobs, callers that leave. `--seed` repeats the
same choices. The well-behaved tenant streams with an adapter, asks for whole answers, uploads adapters and, now and then,
runs a job.

Windows without attacks and windows with them take turns, so that a machine that drifts cancels out. The attackers run at the
lowest priority (nice 19), in --attackers processes of --threads threads, and rest so that each process takes at most --share
of a core: what is measured is what their requests cost the server, not what it costs to make them.

It exits with 1 unless all of these hold:
  - every request of the well-behaved tenant succeeds;
  - the 99th percentile of its time to first token is less than 1.5 times that of the windows without attacks;
  - no process of `up` ends or is started again;
  - each process stays under the memory limit of its pod in deploy/base (peak resident set, VmHWM);
  - after both tenants are deleted, nothing of them is left in the data folder or in the folder for temporary files;
  - after `up` has ended, none of its processes runs.

  scripts/bench attack                              ten minutes of attacks
  scripts/bench attack --seconds 60 --seed 3
  scripts/bench attack --only costly_schemas costly_grammars --seconds 30
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks._deployment import DEMO, Deployment
from benchmarks._report import save
from benchmarks._watch import Watch, ends_and_memory, running
from tests.support.attacks import ATTACKS

ROOT = Path(__file__).parents[1]
FLAGS = f"--dtype float32 --max-num-seqs 64 --kv-cache-memory-bytes {256 << 20}"
PER_MINUTE = {"stream": 150.0, "completion": 30.0, "upload": 4.0, "job": 1.0}
QUIET_SECONDS, ATTACKED_SECONDS, SETTLING_SECONDS = 20.0, 40.0, 4.0
CLEAN_SECONDS = 90.0
LIMITS = {
    "storage_bytes": 256 << 20,
    "adapters": 30,
    "jobs": 5,
    "running_jobs": 1,
    "concurrent_requests": 32,
}


class Child:
    """A process of this benchmark that reads JSON and commands, and prints JSON when its input ends."""

    def __init__(self, module: str, target: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.say(json.dumps(target))

    def say(self, line: str) -> None:
        """Write a line to it."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def end(self) -> Any:
        """End its input and return what it prints."""
        out, _ = self._process.communicate(timeout=400)
        return json.loads(out)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Run the benchmark, print its tables, write JSON; exit with 1 if something does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=600,
        help="time of attacks, without the windows between them",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of every choice of the attackers and the tenant"
    )
    parser.add_argument("--attackers", type=int, default=1, help="processes of the hostile tenant")
    parser.add_argument("--threads", type=int, default=4, help="attacks at once of each of them")
    parser.add_argument(
        "--share", type=float, default=0.2, help="of a core that each of them may take"
    )
    parser.add_argument(
        "--only", nargs="*", default=[], choices=list(ATTACKS), help="attacks to do; default: all"
    )
    parser.add_argument("--flags", default=FLAGS, help="flags of `up`, in one string")
    parser.add_argument("--tag", help="suffix of the result's file name")
    args = parser.parse_args()
    result = {
        "arguments": vars(args),
        "limits_of_the_hostile_tenant": LIMITS,
        "per_minute": PER_MINUTE,
    }
    result |= run(args)
    report(result)
    save("attack" if args.tag is None else f"attack-{args.tag}", result)
    sys.exit(bool(result["failures"]))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One run in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        temporary = folder / "tmp"
        temporary.mkdir()
        places = {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        places |= {
            "REFT_SWEEP_SECONDS": "30",
            "REFT_UPKEEP_SECONDS": "10",
        }  # not ten minutes, at the end
        deployment = Deployment(folder, shlex.split(args.flags), **places)
        try:
            before = set(_files(folder))
            watch = Watch(deployment)
            try:
                result, tenants = _attacked(args, deployment)
            finally:
                watch.end()
            result["left_on_disk"] = _left(deployment, folder, tenants, before)
            last = watch.look()
        finally:
            deployment.stop()
        result |= ends_and_memory(watch, last)
        result["left_running"] = running(watch.roles)
        # vLLM leaves the sockets of its processes and, at each start, the file of their group.
        left = [
            path
            for path in temporary.rglob("*")
            if not path.is_socket() and not path.name.startswith("vllm_dist_")
        ]
        result["left_temporary"] = sorted(str(path.relative_to(temporary)) for path in left)
        result["log_tail"] = deployment.log.read_text(errors="replace")[-2000:]
    result["failures"] = _failures(result)
    return result


def _attacked(args: argparse.Namespace, deployment: Deployment) -> tuple[dict[str, Any], list[str]]:
    admin = {"authorization": f"Bearer {deployment.key}"}
    files = {
        path.name: base64.b64encode(path.read_bytes()).decode()
        for path in (DEMO / "adapters" / "cats").iterdir()
    }
    with httpx.Client(
        base_url=deployment.url, headers=admin, timeout=60, trust_env=False
    ) as client:
        hostile, steady = _tenant(client, "hostile", LIMITS), _tenant(client, "steady", {})
        keys = {role: _key(client, hostile, role) for role in ("inference", "owner")}
        key = _key(client, steady, "owner")
        parts = [("files", (name, base64.b64decode(content))) for name, content in files.items()]
        client.post(
            "/v1/adapters",
            data={"name": "cats"},
            files=parts,
            headers={"authorization": f"Bearer {key}"},
        ).raise_for_status()
    common = {"url": deployment.url, "adapter": files}
    tenant = Child(
        "benchmarks._steady_tenant",
        common | {"key": key, "seed": args.seed, "per_minute": PER_MINUTE},
    )
    crowd = [
        Child("benchmarks._attacker", common | keys | {
            "seed": f"{args.seed} {k}", "threads": args.threads, "share": args.share, "attacks": args.only,
        })
        for k in range(args.attackers)
    ]  # fmt: skip
    try:
        windows = _windows(args.seconds, crowd)
        attacks = [child.end() for child in crowd]
        done = tenant.end()
    except BaseException:
        for child in (*crowd, tenant):
            child.kill()
        raise
    return {"windows": windows, "tenant": _judged(done, windows), "attacks": _merged(attacks)}, [
        hostile,
        steady,
    ]


def _tenant(client: httpx.Client, name: str, limits: dict[str, int]) -> str:
    answer = client.post(
        "/v1/admin/tenants", json={"name": name, "limits": limits}
    ).raise_for_status()
    return str(answer.json()["id"])


def _key(client: httpx.Client, tenant: str, role: str) -> str:
    answer = client.post(f"/v1/admin/tenants/{tenant}/keys", json={"role": role}).raise_for_status()
    return str(answer.json()["secret"])


def _windows(seconds: float, crowd: Sequence[Child]) -> list[dict[str, Any]]:
    """Quiet and attacked windows in turn, a quiet one first and last; the ones with attacks last `seconds` together."""
    count = max(1, round(seconds / ATTACKED_SECONDS))
    windows = []
    for number in range(2 * count + 1):
        attacked = bool(number % 2)
        for child in crowd:
            child.say("on" if attacked else "off")
        begun = time.time()
        time.sleep(seconds / count if attacked else QUIET_SECONDS)
        windows.append({"attacked": attacked, "from": begun, "to": time.time()})
    return windows


def _judged(done: list[dict[str, Any]], windows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the well-behaved tenant saw, by kind and by window."""
    firsts: dict[bool, list[float]] = {False: [], True: []}
    for each in done:
        for window in windows:
            # What begins right after a change belongs to neither.
            if (
                window["from"] + SETTLING_SECONDS <= each["at"] < window["to"]
                and each["kind"] == "stream"
            ):
                firsts[window["attacked"]].append(each["first"])
    spread = {
        "attacked" if attacked else "quiet": {
            "streams": len(first),
            "p50_ms": round(1e3 * statistics.median(first), 1) if first else None,
            "p99_ms": round(1e3 * _quantile(first, 0.99), 1) if first else None,
        }
        for attacked, first in firsts.items()
    }
    counts = Counter(each["kind"] for each in done)
    faults = [each for each in done if each["fault"]]
    return {
        "requests": counts,
        "first_token": spread,
        "faults": faults[:50],
        "faults_in_all": len(faults),
    }


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def _merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in ATTACKS:
        outcomes: Counter[str] = Counter()
        for each in reports:
            outcomes.update(each["outcomes"].get(name, {}))
        if outcomes:
            slowest = max(each["slowest"].get(name, 0.0) for each in reports)
            merged[name] = {"outcomes": dict(outcomes), "slowest_seconds": slowest}
    return merged


def _left(deployment: Deployment, folder: Path, tenants: list[str], before: set[str]) -> list[str]:
    """Delete both tenants and list what is there after a while and was not before: nothing may be."""
    admin = {"authorization": f"Bearer {deployment.key}"}
    with httpx.Client(
        base_url=deployment.url, headers=admin, timeout=120, trust_env=False
    ) as client:
        for tenant in tenants:
            client.delete(f"/v1/admin/tenants/{tenant}").raise_for_status()
    until = time.monotonic() + CLEAN_SECONDS
    while (left := set(_files(folder)) - before) and time.monotonic() < until:
        time.sleep(1)
    return sorted(left)[:200]


def _files(folder: Path) -> list[str]:
    places = [folder / "data" / name for name in ("adapters", "blobs", "work")]
    paths = [path for place in places for path in place.rglob("*") if path.is_file()]
    temporary = folder / "tmp"
    paths += [path for path in temporary.rglob("*") if path.is_file()]
    return [str(path.relative_to(folder)) for path in paths]


def _failures(result: dict[str, Any]) -> list[str]:
    tenant, first = result["tenant"], result["tenant"]["first_token"]
    failures = []
    if tenant["faults_in_all"]:
        failures.append(f"{tenant['faults_in_all']} requests of the well-behaved tenant failed")
    if first["quiet"]["streams"] and first["attacked"]["streams"]:
        ratio = result["p99_ratio"] = round(
            first["attacked"]["p99_ms"] / first["quiet"]["p99_ms"], 2
        )
        if ratio >= 1.5:
            failures.append(
                f"the 99th percentile of its time to first token is {ratio} times that without attacks"
            )
    else:
        failures.append("there are too few streams to compare")
    if result["ended"]:
        failures.append(f"processes ended: {result['ended']}")
    for role, memory in result["memory"].items():
        if memory["peak_bytes"] >= memory["limit_bytes"]:
            failures.append(
                f"{role} took {memory['peak_bytes'] >> 20} MiB of {memory['limit_bytes'] >> 20}"
            )
    broken = {
        name: {
            outcome: count
            for outcome, count in each["outcomes"].items()
            if outcome in ("500", "502", "504")
        }
        for name, each in result["attacks"].items()
    }
    failures += [f"{name} was answered {outcomes}" for name, outcomes in broken.items() if outcomes]
    for name in ("left_on_disk", "left_running", "left_temporary"):
        if result[name]:
            failures.append(f"{name}: {', '.join(result[name][:5])} ({len(result[name])} in all)")
    return failures


def report(result: dict[str, Any]) -> None:
    """Print the tables."""
    table = Table("attack", "outcomes", "slowest")
    for name, each in result["attacks"].items():
        outcomes = ", ".join(
            f"{outcome} x{count}" for outcome, count in sorted(each["outcomes"].items())
        )
        table.add_row(name, outcomes, f"{each['slowest_seconds']:.1f} s")
    console = Console()
    console.print(table)
    console.print(result["tenant"]["first_token"], result["tenant"]["requests"], result["memory"])
    for fault in result["tenant"]["faults"][:10]:
        console.print(fault)
    console.print(result["failures"] or "everything holds")


if __name__ == "__main__":
    main()
