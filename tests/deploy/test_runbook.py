"""The runbook's own lines: `reft-serve` ones are run as they are written, the others name what there is."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import yaml

from reft_serve.config import GatewaySettings
from reft_serve.gateway.app import create_app
from tests.support.deploy.manifests import OVERLAYS, environment, rendered, workloads
from tests.support.deploy.processes import BIN
from tests.support.paths import ROOT

RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
KINDS = {
    "deployment": "Deployment",
    "statefulset": "StatefulSet",
    "job": "Job",
    "scaledobject": "ScaledObject",
}


def lines() -> list[str]:
    """The commands of every block, in order, with continued lines joined."""
    blocks = re.findall(r"^( *)```bash\n(.*?)^\1```$", RUNBOOK, re.MULTILINE | re.DOTALL)
    joined = "\n".join(re.sub(r"\\\n\s*", "", block) for _, block in blocks)
    return [line.strip() for line in joined.splitlines() if line.strip()]


def test_the_operators_commands_run_as_they_are_written(tmp_path: Path) -> None:
    """All of them in their order, over one installation; a restore goes into an empty database and an empty store."""
    settings = os.environ | {
        "REFT_DATABASE": f"sqlite:///{tmp_path}/reft.db", "REFT_STORE": str(tmp_path / "adapters"),
        "REFT_BLOBS": str(tmp_path / "blobs"), "PATH": f"{BIN}:{os.environ['PATH']}",
    }  # fmt: skip
    key_id, ran = "", []
    for line in (line for line in lines() if line.startswith("reft-serve ")):
        if " restore " in line:
            settings |= {
                "REFT_DATABASE": f"sqlite:///{tmp_path}/new.db",
                "REFT_STORE": str(tmp_path / "other"),
            }
        words = shlex.split(
            line.replace("/backups/", f"{tmp_path}/backups/").replace("KEY_ID", key_id)
        )
        done = subprocess.run(
            words, env=settings, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        if " key list " in line:
            (key_id,) = re.findall(r"^key_\w+", done.stdout, re.MULTILINE)
        ran.append(words[2])
    assert {"migrate", "tenant", "key", "backup", "restore"} <= set(ran)
    listed = subprocess.run(
        ["reft-serve", "admin", "key", "list", "acme"],
        env=settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert listed.count("\n") >= 1, "the restored database has the tenant's keys"


def test_kubectl_names_what_the_overlay_has() -> None:
    there = {(each["kind"], each["metadata"]["name"]) for each in rendered("cuda")}
    commands = [line for line in lines() if line.startswith("kubectl ")]
    for line in commands:
        for kind, name in re.findall(r"\b(deployment|statefulset|job|scaledobject)/([\w-]+)", line):
            assert (KINDS[kind], name) in there, line
        for path in re.findall(r" -k (\S+)", line):
            assert (ROOT / path / "kustomization.yaml").is_file(), line
        for label in re.findall(r" -l app.kubernetes.io/component=(\w+)", line):
            assert label in {each.component for each in workloads("cuda")}, line
    assert len(commands) > 15


def test_the_secret_that_is_made_is_the_one_that_the_manifests_ask_for() -> None:
    (creating,) = [line for line in lines() if "create secret generic reft-serve" in line]
    made = set(re.findall(r"--from-literal=([\w-]+)=", creating))

    class Asked(dict[str, str]):
        def __missing__(self, key: str) -> str:
            self[key] = "x"
            return "x"

    asked = Asked()
    for overlay in OVERLAYS:
        for each in workloads(overlay):
            environment(each, asked)
    assert made == set(asked)


def test_the_key_that_is_made_for_prometheus_is_the_one_that_it_sends() -> None:
    (creating,) = [line for line in lines() if "create secret generic reft-metrics" in line]
    sent = [
        end["authorization"]["credentials"]
        for each in rendered("cuda")
        if each["kind"] == "PodMonitor"
        for end in each["spec"]["podMetricsEndpoints"]
        if "authorization" in end
    ]
    assert sent == [
        {"name": "reft-metrics", "key": re.findall(r"--from-literal=(\w+)=", creating)[0]}
    ]


def test_the_rule_that_is_applied_holds_the_alerts() -> None:
    (making,) = [line for line in lines() if "PrometheusRule" in line]
    pipeline, _, applying = making.rpartition(" | ")
    assert applying == "kubectl apply -f -"
    done = subprocess.run(
        ["bash", "-c", pipeline], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
    )
    rule = yaml.safe_load(done.stdout)
    assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(
        (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text()
    )


def test_requests_name_routes_that_there_are(tmp_path: Path) -> None:
    document = create_app(
        GatewaySettings(database=f"sqlite:///{tmp_path}/x.db", store=tmp_path)
    ).openapi()
    routes = {
        (method.upper(), re.sub(r"\{\w+\}", "*", path))
        for path, methods in document["paths"].items()
        for method in methods
    }
    asked = [line for line in lines() if line.startswith("curl ")]
    for line in asked:
        method = "POST" if "-X POST" in line else "GET"
        (path,) = re.findall(r"http://GATEWAY:8080(/[\w/-]+)", line)
        assert (method, re.sub(r"/(engine-\d+|KEY_ID)\b", "/*", path)) in routes, line
    assert len(asked) >= 4


def test_settings_that_are_named_are_settings() -> None:
    from reft_serve.config import EngineSettings, TrainerSettings

    fields = {
        *GatewaySettings.model_fields,
        *TrainerSettings.model_fields,
        *EngineSettings.model_fields,
    }
    for page in ("runbook.md", "deployment.md"):
        text = (ROOT / "docs" / page).read_text()
        for name in set(re.findall(r"\bREFT_([A-Z_]+)\b", text)):
            assert name.lower() in fields, f"{page}: REFT_{name}"
