"""Schemathesis on a running gateway: requests made from its OpenAPI document, sound and unsound, and every answer judged."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# A key that rotates itself ends itself, so that path is run last, with a key to spare.
ROTATION = "rotate$"
# What an adapter's or a data file must hold, which settings of a job go together and which URLs are public is more than a
# schema can say, so sound-looking ones may be refused.
_REFUSING = (
    "POST /v1/adapters",
    "POST /v1/files",
    "POST /v1/fine_tuning/jobs",
    "POST /v1/webhook_endpoints",
    "POST /v1/webhook_endpoints/{webhook}",
)
_WAIVER = "\n".join(
    f'[[operations]]\ninclude-name = "{name}"\nchecks.positive_data_acceptance.enabled = false\n' for name in _REFUSING
)


def judge(url: str, key: str, examples: int, folder: Path, *which: str, seed: int = 1) -> int:
    """Run every check of Schemathesis, positive, negative and stateful, and give the number of cases.

    Args:
        url: the gateway's.
        key: of an admin.
        examples: cases per operation, phase and mode.
        folder: where Schemathesis may write.
        which: its own flags that choose operations.
        seed: another one makes other cases.

    Raises:
        AssertionError: an answer is not what the document says; the message has the case that shows it.
    """
    (folder / "schemathesis.toml").write_text(_WAIVER)
    command: Sequence[str] = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", *which,
        "-H", f"Authorization: Bearer {key}", "--phases", "coverage,fuzzing,stateful", "--mode", "all",
        "--max-examples", str(examples), "--seed", str(seed), "--no-color", "--request-timeout", "20",
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    found = re.search(r"([\d,]+) generated", ended.stdout)
    assert found, ended.stdout[-2000:]
    return int(found[1].replace(",", ""))
