"""A PostgreSQL of our own, on loopback, for as long as a test session."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

_USER = "postgres"


@contextmanager
def postgres_server() -> Iterator[str]:
    """The URL of a server's maintenance database: the one that REFT_TEST_POSTGRES names, or a
    private one.
    """
    given = os.environ.get("REFT_TEST_POSTGRES")
    if given:
        yield given
        return
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL: neither REFT_TEST_POSTGRES nor /usr/lib/postgresql/*/bin")
    with (
        tempfile.TemporaryDirectory(prefix="reft-postgres-") as folder,
        _running(found[-1].parent, Path(folder)) as url,
    ):
        yield url


@contextmanager
def _running(binaries: Path, folder: Path) -> Iterator[str]:
    data = folder / "data"
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        account = pwd.getpwnam(_USER)
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        shutil.chown(folder, _USER)
    initdb: list[str | Path] = [
        binaries / "initdb",
        "-D",
        data,
        "-U",
        _USER,
        "--auth=trust",
        "--no-sync",
        "-E",
        "UTF8",
        "--locale=C",
    ]
    subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (
        f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off -c "
        "max_connections=200"
    )
    control: list[str | Path] = [binaries / "pg_ctl", "-D", data, "-w", "-l", folder / "log"]
    subprocess.run(
        [*control, "-o", options, "start"],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=folder,
        **user,
    )
    try:
        yield f"postgresql://{_USER}@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run(
            [*control, "-m", "immediate", "stop"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=folder,
            **user,
        )


def create_database(server: str, name: str) -> str:
    """A new database on a server: its URL."""
    _execute(server, f"CREATE DATABASE {name}")
    return f"{server.rpartition('/')[0]}/{name}"


def _execute(server: str, statement: str) -> None:
    async def executed() -> None:
        driver = server.replace("postgresql://", "postgresql+asyncpg://")
        engine = create_async_engine(driver, isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            await connection.execute(text(statement))
        await engine.dispose()

    asyncio.run(executed())


BOTH = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


def execute(url: str, statement: str) -> list[tuple[object, ...]]:
    """One statement on a PostgreSQL server; its rows."""

    async def executed() -> list[tuple[object, ...]]:
        engine = create_async_engine(
            url.replace("postgresql:", "postgresql+asyncpg:"), isolation_level="AUTOCOMMIT"
        )
        async with engine.connect() as connection:
            found = await connection.execute(text(statement))
            rows = [tuple(row) for row in found] if found.returns_rows else []
        await engine.dispose()
        return rows

    return asyncio.run(executed())
