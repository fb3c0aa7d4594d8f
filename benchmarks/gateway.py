"""What the gateway costs: the same requests to an engine directly and through the gateway, in turns.

By default the engine is the fake one, which answers at once and then every 50 ms, so that what is measured is the gateway;
with `--engine real` it is vLLM with a 110 M-parameter Llama shape. The gateway runs as it does by default: each request is
logged and counted in SQLite. Engine, gateway and this client are three processes of one machine; `direct` requests per second
show how much the other two could take.

  scripts/bench gateway
  scripts/bench gateway --engine real
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import reft_serve.demo
from benchmarks._report import save
from reft_serve.database import keys, tenants
from reft_serve.database.connection import Database
from reft_serve.database.migrations.schema import migrate
from tests.support.gateway.process import free_port, listening
from tests.support.shapes import Shape

FAKE_MODEL, REAL_MODEL = "/models/fake-base", "random"
TOKENIZER = Path(reft_serve.demo.__file__).parent / "model"


@dataclass(frozen=True)
class Arm:
    """Where requests go, and as whom."""

    name: str
    host: str
    port: int
    model: str
    key: str

    def request(self, tokens: int, stream: bool) -> bytes:
        body = {
            "model": self.model,
            "prompt": "one two three",
            "max_tokens": tokens,
            "stream": stream,
            "ignore_eos": True,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {self.host}\r\nauthorization: Bearer {self.key}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        return head.encode() + content


class Connection:
    """HTTP/1.1 by hand, so that the client costs little beside what it measures."""

    def __init__(
        self, arm: Arm, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.arm, self.reader, self.writer = arm, reader, writer

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, arm: Arm) -> AsyncIterator[Connection]:
        reader, writer = await asyncio.open_connection(arm.host, arm.port)
        try:
            yield cls(arm, reader, writer)
        finally:
            writer.close()

    async def ask(self, tokens: int, stream: bool) -> tuple[float, bytes]:
        """(seconds to the first byte of the body, the body)."""
        begun = time.perf_counter()
        self.writer.write(self.arm.request(tokens, stream))
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        assert b" 200 " in head.partition(b"\r\n")[0], head
        if b"transfer-encoding: chunked" not in head:
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            return time.perf_counter() - begun, await self.reader.readexactly(length)
        first, pieces = 0.0, []
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            first = first or time.perf_counter() - begun
            pieces.append((await self.reader.readexactly(size + 2))[:-2])
        await self.reader.readexactly(2)
        return first, b"".join(pieces)


async def first_bytes(arm: Arm, count: int) -> list[float]:
    """Seconds to the first token of streams, one after the other."""
    async with Connection.to(arm) as connection:
        return [(await connection.ask(1, stream=True))[0] for _ in range(count)]


async def streaming(arm: Arm, streams: int, tokens: int) -> float:
    """Tokens per second of streams side by side."""

    async def one() -> None:
        async with Connection.to(arm) as connection:
            _, body = await connection.ask(tokens, stream=True)
            assert body.endswith(b"data: [DONE]\n\n")
            assert f'"completion_tokens":{tokens}'.encode() in body.rpartition(b'"choices":[]')[2]

    begun = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(streams)))
    return streams * tokens / (time.perf_counter() - begun)


async def requests_per_second(arm: Arm, connections: int, seconds: float) -> float:
    """Requests per second, not streamed."""
    done, end = 0, time.perf_counter() + seconds

    async def one() -> None:
        nonlocal done
        async with Connection.to(arm) as connection:
            while time.perf_counter() < end:
                await connection.ask(1, stream=False)
                done += 1

    begun = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(connections)))
    return done / (time.perf_counter() - begun)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has had: unlike the clock, it is the same however busy the machine is."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(
    args: argparse.Namespace, direct: Arm, through: Arm, gateway: int
) -> dict[str, Any]:
    """Rounds of all three, the arms in turns; `gateway` is the gateway's process."""
    first: dict[str, list[float]] = {"direct": [], "gateway": []}
    speed: dict[str, list[float]] = {"direct": [], "gateway": []}
    rate: dict[str, list[float]] = {"direct": [], "gateway": []}
    costs: list[tuple[float, float]] = []
    for turn in range(-1, args.rounds):
        for arm in (direct, through) if turn % 2 else (through, direct):
            firsts = await first_bytes(arm, args.requests)
            marks = [cpu_seconds(gateway)]
            streamed = await streaming(arm, args.streams, args.tokens)
            marks.append(cpu_seconds(gateway))
            rated = await requests_per_second(arm, args.connections, args.seconds)
            marks.append(cpu_seconds(gateway))
            if turn >= 0:  # the first round warms caches
                if arm is through:
                    token = (marks[1] - marks[0]) / (args.streams * args.tokens)
                    costs.append((token, (marks[2] - marks[1]) / rated / args.seconds))
                first[arm.name] += firsts
                speed[arm.name].append(streamed)
                rate[arm.name].append(rated)
    quantiles = {name: statistics.quantiles(values, n=100) for name, values in first.items()}
    return {
        "first_byte_ms": {
            name: {"p50": 1e3 * each[49], "p99": 1e3 * each[98], "count": len(first[name])}
            | {"percentiles": [round(1e3 * value, 3) for value in each]}
            for name, each in quantiles.items()
        },
        "added_ms": {f"p{p}": 1e3 * (quantiles["gateway"][p - 1] - quantiles["direct"][p - 1]) for p in (50, 99)},
        "tokens_per_s": speed,
        "streaming_ratio": statistics.median(g / d for d, g in zip(speed["direct"], speed["gateway"], strict=True)),
        "requests_per_s": rate,
        "gateway_cpu_us_per_token": 1e6 * statistics.median(cost[0] for cost in costs),
        "gateway_cpu_ms_per_request": 1e3 * statistics.median(cost[1] for cost in costs),
    }  # fmt: skip


async def first_key(url: str, role: keys.Role = "inference") -> str:
    database = Database(url)
    await migrate(database)
    async with database.writing() as session:
        _, secret = await keys.create_key(
            session, await tenants.create_tenant(session, f"bench-{role}"), role
        )
    await database.close()
    return secret


def serve_fake(port: int, token_seconds: float) -> None:
    """Be the fake engine's process."""
    import uvicorn

    from reft_serve.testing import FakeEngine

    uvicorn.run(
        FakeEngine(token_seconds=token_seconds, remember=False).app, port=port, log_level="error"
    )


def main() -> None:
    """Run the benchmark, print its table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("fake", "real"), default="fake")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--requests", type=int, default=200, help="streams one after the other, per arm and round"
    )
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--token-seconds", type=float, default=0.05, help="the fake engine's time per token"
    )
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="per arm and round, for requests per second"
    )
    parser.add_argument("--serve-fake", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_fake:
        serve_fake(args.serve_fake, args.token_seconds)
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        engine, port, database = free_port(), free_port(), f"sqlite:///{Path(folder) / 'reft.db'}"
        if args.engine == "fake":
            command, model = fake_engine(engine, args.token_seconds), FAKE_MODEL
        else:
            command, model = real_engine(engine, Path(folder) / "model", args.streams), REAL_MODEL
        stack.enter_context(listening(command, engine))
        key = asyncio.run(first_key(database))
        settings = {
            "REFT_DATABASE": database,
            "REFT_STORE": folder,
            "REFT_ENGINES": f"http://127.0.0.1:{engine}",
        }
        gateway = [sys.executable, "-m", "reft_serve.cli.gateway", "--port", str(port)]
        pid = stack.enter_context(listening(gateway, port, **settings))
        direct = Arm("direct", "127.0.0.1", engine, model, "none")
        result = asyncio.run(
            measure(args, direct, Arm("gateway", "127.0.0.1", port, "base", key), pid)
        )
    result = {"arguments": vars(args), **result}
    _print(result)
    save("gateway" if args.engine == "fake" else "gateway-real", result, _plot)


def fake_engine(port: int, token_seconds: float) -> list[str]:
    """The command of the fake engine."""
    fake = [sys.executable, "-m", "benchmarks.gateway", "--serve-fake", str(port)]
    return [*fake, "--token-seconds", str(token_seconds)]


def real_engine(port: int, folder: Path, streams: int) -> list[str]:
    """The command of vLLM with random weights and the shipped tokenizer."""
    tokenizer = {
        file.name: file.read_bytes()
        for file in TOKENIZER.iterdir()
        if file.name.startswith("tokenizer")
    }
    vocabulary = len(json.loads(tokenizer["tokenizer.json"])["model"]["vocab"])
    Shape(vocab=-(-vocabulary // 64) * 64).write(folder)
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)
    serve = [
        str(Path(sys.executable).with_name("reft-serve")),
        "serve",
        str(folder),
        "--port",
        str(port),
    ]
    return [
        *serve,
        "--load-format",
        "dummy",
        "--max-num-seqs",
        str(streams),
        "--served-model-name",
        REAL_MODEL,
    ]


def _plot(result: dict[str, Any], axes: Any) -> None:
    for name, each in result["first_byte_ms"].items():
        axes.plot(range(1, 100), each["percentiles"], label=name)
    axes.set_xlabel("percentile")
    axes.set_ylabel("time to first token, ms")
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"The same stream to the {result['arguments']['engine']} engine, directly and through the gateway"
    )
    axes.legend(frameon=False)


def _print(result: dict[str, Any]) -> None:
    table = Table("", "direct", "gateway", "")
    first, added = result["first_byte_ms"], result["added_ms"]
    for p in ("p50", "p99"):
        table.add_row(
            f"first byte, {p}, ms", *(f"{first[arm][p]:.2f}" for arm in first), f"+{added[p]:.2f}"
        )
    for title, name in (("streamed tokens/s", "tokens_per_s"), ("requests/s", "requests_per_s")):
        direct, gateway = (statistics.median(result[name][arm]) for arm in ("direct", "gateway"))
        table.add_row(title, f"{direct:,.0f}", f"{gateway:,.0f}", f"x{gateway / direct:.3f}")
    Console().print(table)
    per_token, per_request = (
        result["gateway_cpu_us_per_token"],
        result["gateway_cpu_ms_per_request"],
    )
    Console().print(
        f"the gateway's CPU time: {per_token:.0f} us per streamed token, {per_request:.2f} ms per request"
    )


if __name__ == "__main__":
    main()
