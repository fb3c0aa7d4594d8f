"""Ready means that a request could be written down: the database and the stores take bytes."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from pathlib import Path

import pytest

from reft_serve.adapters.store import AdapterStore
from reft_serve.errors import DatabaseUnusable, StoreUnusable
from reft_serve.gateway.write_probe import WriteProbe
from tests.support.gateway.harness import Gateway, running
from tests.support.waiting import wait_for


def ready(gateway: Gateway) -> tuple[int, str]:
    answer = gateway.http(None).get("/health/ready")
    return answer.status_code, answer.json().get("error", {}).get("code", "")


def test_a_gateway_whose_database_or_store_cannot_be_written_to_is_not_ready(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as (gateway, _):
        wait_for(lambda: ready(gateway) == (200, ""))
        holder = sqlite3.connect(tmp_path / "reft.db", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        wait_for(lambda: ready(gateway) == (503, "database_unusable"), 10)
        holder.execute("ROLLBACK")
        wait_for(lambda: ready(gateway) == (200, ""), 6)
        folder = gateway.settings.store / ".probes"
        wait_for(lambda: _replaced(folder))
        wait_for(lambda: ready(gateway) == (503, "store_unusable"), 10)
        folder.unlink()
        wait_for(lambda: ready(gateway) == (200, ""), 6)


def _replaced(folder: Path) -> bool:
    """Put a file in the place of a folder, so that nothing can be written there."""
    try:
        folder.rmdir()
        folder.touch()
    except OSError:
        return False
    return folder.is_file()


def test_a_full_disk_makes_the_store_unusable(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    with pytest.raises(StoreUnusable, match="No space"), store.staging():
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), store.staging() as staged:
        (staged / "absent").read_bytes()
    assert not list((tmp_path / ".staging").iterdir())


@pytest.mark.anyio
async def test_a_write_that_does_not_end_counts_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reft_serve.gateway.write_probe.PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr("reft_serve.gateway.write_probe.PROBE_SECONDS", 0.01)
    gate = asyncio.Event()
    gate.set()

    async def write() -> None:
        await gate.wait()

    probe = WriteProbe({"the database": (write, DatabaseUnusable("no"))})
    probe.start()
    await asyncio.sleep(0.05)
    probe.check()
    gate.clear()
    await asyncio.sleep(0.3)
    with pytest.raises(DatabaseUnusable):
        probe.check()
    gate.set()
    await asyncio.sleep(0.05)
    probe.check()
    await probe.close()
