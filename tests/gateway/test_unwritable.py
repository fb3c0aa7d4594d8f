"""A database that can be read and not written: requests are refused before an engine is asked, and
none is billed.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from tests.support.gateway.harness import running, usage_of
from tests.support.waiting import wait_for

BODY = {"model": "base", "prompt": "x", "max_tokens": 3}


def test_while_the_database_is_locked_no_request_is_computed_in_vain(tmp_path: Path) -> None:
    with running(tmp_path) as (gateway, (engine,)):
        tenant = gateway.tenant("acme")
        assert tenant.http.post("/v1/completions", json=BODY).status_code == 200
        lock = sqlite3.connect(tmp_path / "reft.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        asked = [tenant.http.post("/v1/completions", json=BODY) for _ in range(3)]
        assert [(each.status_code, each.json()["error"]["code"]) for each in asked] == [
            (503, "database_unusable")
        ] * 3
        assert engine.counts["requests"] == 2  # the first one was computed before it could be known
        assert gateway.http(None).get("/health/ready").status_code == 503
        lock.execute("ROLLBACK")
        lock.close()
        wait_for(lambda: gateway.http(None).get("/health/ready").status_code == 200, 10.0)
        assert tenant.http.post("/v1/completions", json=BODY).status_code == 200
        counted = {each["group"]["status"]: each for each in usage_of(tenant, "status")}
        assert counted["completed"]["requests"] == 2
        assert counted["failed"]["completion_tokens"] == 0
