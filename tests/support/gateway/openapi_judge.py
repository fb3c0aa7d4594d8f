"""Schemathesis on a running gateway: requests made from its OpenAPI document, sound and unsound, and every answer judged."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.support.gateway.harness import adapter_files
from tests.support.gateway.links import with_links

# A key that rotates itself ends itself, so that path is run last, with a key to spare.
ROTATION = "rotate$"
# What an adapter's or a data file must hold, which settings of a job go together, whether each text has its second one, which
# URLs are public and whether anything answers there is more than a schema can say, so sound-looking ones may be refused.
_REFUSING = (
    "POST /v1/classify",
    "POST /v1/adapters",
    "POST /v1/files",
    "POST /v1/fine_tuning/jobs",
    "POST /v1/webhook_endpoints",
    "POST /v1/webhook_endpoints/{webhook}",
    "POST /v1/webhook_endpoints/{webhook}/test",
)
_WAIVER = "\n".join(
    f'[[operations]]\ninclude-name = "{name}"\nchecks.positive_data_acceptance.enabled = false\n'
    for name in _REFUSING
)
# Schemathesis's own, and 413: a list beyond its limit can be a body beyond its limit.
_REFUSALS = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429, "5xx"]
_CHECKS = f"[checks]\nnegative_data_rejection.expected-statuses = {json.dumps(_REFUSALS)}\n"


def furnish(client: httpx.Client) -> dict[str, list[str]]:
    """Make some of everything, with an admin's key, and give the names and ids by what the document calls them."""

    def made(path: str, **body: Any) -> Any:
        answer = client.post(path, **body)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    models = []
    for seed in (1, 2, 3):
        parts = [("files", item) for item in adapter_files(seed).items()]
        models.append(
            made("/v1/adapters", data={"name": "birds", "alias": "production"}, files=parts)[
                "model"
            ]
        )
    row = (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    files = [
        made("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", row)})["id"]
        for _ in range(2)
    ]
    jobs = [
        made("/v1/fine_tuning/jobs", json={"model": "base", "training_file": files[0]})["id"]
        for _ in range(3)
    ]
    hook = {"name": "x", "url": "http://127.0.0.1:9/x", "event_types": ["fine_tuning.job.failed"]}
    tenants = [
        made("/v1/admin/tenants", json={"name": f"furnished-{secrets.token_hex(4)}"})["id"]
        for _ in range(2)
    ]
    return {
        "path.name": ["birds"], "path.version": ["1", "2", "production"], "path.alias": ["production", "canary"],
        "path.model": ["birds", "birds@1", *models], "body.model": ["base", "birds", *models],
        "path.file": files, "body.training_file": files, "path.job": jobs, "path.checkpoint": models,
        "path.webhook": [made("/v1/webhook_endpoints", json=hook)["id"]], "path.tenant": tenants,
        "path.key": [made("/v1/keys", json={"role": "inference"})["id"]], "path.engine": ["engine-0"],
    }  # fmt: skip


def _settings(known: Mapping[str, Sequence[str]]) -> str:
    """Schemathesis's settings: two of three requests take what is there, where they can."""
    bound = [
        f"[dictionaries.{name.replace('.', '-')}]\nvalues = {json.dumps(list(values))}\n"
        for name, values in known.items()
    ]
    places = [
        f'"{name}" = {{ dictionary = "{name.replace(".", "-")}", probability = 0.66 }}'
        for name in known
    ]
    return "\n".join([*bound, "[parameters]", *places, "", _CHECKS, _WAIVER])


def judge(
    url: str,
    key: str,
    examples: int,
    folder: Path,
    known: Mapping[str, Sequence[str]],
    *which: str,
    seed: int = 1,
) -> int:
    """Run every check of Schemathesis, positive, negative and stateful, and give the number of cases.

    Args:
        url: the gateway's.
        key: of an admin.
        examples: cases per operation, phase and mode.
        folder: where Schemathesis may write.
        known: what `furnish` has made.
        which: its own flags that choose operations.
        seed: another one makes other cases.

    Raises:
        AssertionError: an answer is not what the document says; the message has the case that shows it.
    """
    (folder / "schemathesis.toml").write_text(_settings(known))
    answer = httpx.get(f"{url}/openapi.json", headers={"authorization": f"Bearer {key}"})
    (folder / "openapi.json").write_text(json.dumps(with_links(answer.raise_for_status().json())))
    # Of one operation alone no sequences can be made.
    phases = "coverage,fuzzing" if "--include-path-regex" in which else "coverage,fuzzing,stateful"
    command: Sequence[str] = [
        str(Path(sys.executable).with_name("schemathesis")), "run", "openapi.json", "--url", url, *which,
        "-H", f"Authorization: Bearer {key}", "--phases", phases, "--mode", "all",
        "--max-examples", str(examples), "--seed", str(seed), "--no-color", "--request-timeout", "20",
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    found = re.search(r"([\d,]+) generated", ended.stdout)
    assert found, ended.stdout[-2000:]
    return int(found[1].replace(",", ""))
