"""The Kubernetes manifests as the cluster would get them, and what a kubelet would make of a
container's description.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

OVERLAYS = ("cpu", "cuda", "multi-node")
Object = dict[str, Any]


@functools.cache
def rendered(overlay: str) -> tuple[Object, ...]:
    """Every object of an overlay. Skips where there is no kubectl to render it with."""
    return render(ROOT / "deploy" / "overlays" / overlay)


def render(folder: Path) -> tuple[Object, ...]:
    """Every object of a folder with a kustomization."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: it renders the manifests")
    done = subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # a warning there is a field that Kustomize will drop
    return tuple(yaml.safe_load_all(done.stdout))


def objects(overlay: str, kind: str) -> list[Object]:
    """The objects of one kind."""
    return [each for each in rendered(overlay) if each["kind"] == kind]


def named(overlay: str, kind: str, name: str) -> Object:
    """One object; a name that Kustomize has made longer by a hash counts too."""
    pattern = re.compile(rf"{re.escape(name)}(-[a-z0-9]{{10}})?")
    (found,) = [
        each for each in objects(overlay, kind) if pattern.fullmatch(each["metadata"]["name"])
    ]
    return found


@dataclass(frozen=True)
class Workload:
    """A template of pods, and whose it is."""

    overlay: str
    name: str
    template: Object

    @property
    def labels(self) -> dict[str, str]:
        found: dict[str, str] = self.template["metadata"]["labels"]
        return found

    @property
    def spec(self) -> Object:
        found: Object = self.template["spec"]
        return found

    @property
    def container(self) -> Object:
        (only,) = self.spec["containers"]
        found: Object = only
        return found

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    def __str__(self) -> str:
        return f"{self.overlay}:{self.name}"


def workloads(overlay: str) -> Iterator[Workload]:
    """Every template of pods in an overlay."""
    for each in rendered(overlay):
        name, spec = each["metadata"]["name"], each.get("spec", {})
        if "template" in spec:
            yield Workload(overlay, name, spec["template"])
        for role in ("leader", "worker"):
            if f"{role}Template" in spec.get("leaderWorkerTemplate", {}):
                yield Workload(
                    overlay, f"{name}-{role}", spec["leaderWorkerTemplate"][f"{role}Template"]
                )


def workload(overlay: str, name: str) -> Workload:
    """One of them."""
    (found,) = [each for each in workloads(overlay) if each.name == name]
    return found


def environment(of: Workload, secrets: Mapping[str, str]) -> dict[str, str]:
    """What a container would find in its environment. `secrets` stands for the Secret
    `reft-serve`.
    """
    found: dict[str, str] = {}
    for source in of.container.get("envFrom", []):
        found |= named(of.overlay, "ConfigMap", source["configMapRef"]["name"])["data"]
    for each in of.container.get("env", []):
        if "value" in each:
            found[each["name"]] = each["value"]
            continue
        source = each["valueFrom"]
        if "secretKeyRef" in source:
            assert source["secretKeyRef"]["name"] == "reft-serve"
            found[each["name"]] = secrets[source["secretKeyRef"]["key"]]
        else:
            assert source == {"fieldRef": {"fieldPath": "metadata.name"}}
            found[each["name"]] = f"{of.name}-0"
    return found


def command(of: Workload, variables: Mapping[str, str]) -> list[str]:
    """The command with each `$(NAME)` put in, as a kubelet does it."""
    words = [*of.container.get("command", []), *of.container.get("args", [])]
    return [re.sub(r"\$\(([A-Z_]+)\)", lambda match: variables[match[1]], word) for word in words]


def seconds(probe: Object) -> float:
    """How long a probe may fail before it counts."""
    return float(probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3))


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector of equalities takes these labels; an empty one takes all."""
    assert set(selector) <= {"matchLabels"}, selector
    return selector.get("matchLabels", {}).items() <= labels.items()
