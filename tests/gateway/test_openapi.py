"""The OpenAPI document is true: Schemathesis makes requests from it, sound and unsound, and judges every answer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.gateway.harness import Gateway, running

# REFT_TEST_EXAMPLES=400 makes more than 20,000 cases.
EXAMPLES = os.environ.get("REFT_TEST_EXAMPLES", "3")
ROTATION = "rotate$"
# What an adapter's files must hold is more than a schema can say, so sound-looking ones may be refused.
WAIVER = """
[[operations]]
include-name = "POST /v1/adapters"
checks.positive_data_acceptance.enabled = false
"""


def judge(gateway: Gateway, key: str, which: str, folder: Path) -> int:
    """Run every check of Schemathesis on some of the paths and give the number of cases."""
    (folder / "schemathesis.toml").write_text(WAIVER)
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{gateway.url}/openapi.json", which, ROTATION,
        "-H", f"Authorization: Bearer {key}", "--phases", "coverage,fuzzing,stateful",
        "--max-examples", EXAMPLES, "--seed", "1", "--no-color", "--request-timeout", "20",
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-6000:]
    found = re.search(r"([\d,]+) generated", ended.stdout)
    assert found, ended.stdout[-2000:]
    return int(found[1].replace(",", ""))


def test_every_answer_is_what_the_document_says(tmp_path: Path) -> None:
    with running(tmp_path) as (gateway, (engine,)):
        engine.remember = False
        gateway.tenant("acme").upload("birds")
        cases = judge(gateway, gateway.admin_key, "--exclude-path-regex", tmp_path)
        assert gateway.admin.get("/v1/tenant").status_code == 200, "the key died, so what came after shows nothing"
        # A key that rotates itself ends itself, so this one is spent on it.
        spare = gateway.admin.post("/v1/keys", json={"role": "admin"}).json()["secret"]
        cases += judge(gateway, spare, "--include-path-regex", tmp_path)
        print(f"{cases} cases")
        assert cases > 1000
