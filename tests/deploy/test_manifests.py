"""Every overlay renders, is what three versions of Kubernetes take, and keeps to the rules of a careful cluster."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tests.support.deploy.manifests import (
    OVERLAYS,
    ROOT,
    Workload,
    named,
    objects,
    render,
    rendered,
    seconds,
    selects,
    workloads,
)  # fmt: skip

# From the first that has preStop's `sleep` to the newest whose schemas there are.
VERSIONS = ("1.30", "1.33", "1.36")
CUSTOM = {"LeaderWorkerSet", "PodMonitor", "ScaledObject", "TriggerAuthentication"}
GRACE_SPARE = 10
PORTS_OUTSIDE = {5432, 6379, 443, 4318}


def every(overlay: str) -> list[Workload]:
    return list(workloads(overlay))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_takes_it(overlay: str, version: str) -> None:
    for each in rendered(overlay):
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, version, strict=True)
    for workload in every(overlay):  # those inside of custom resources too
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", **workload.template}, version, strict=True
        )


def test_the_schemas_would_not_take_a_wrong_field() -> None:
    wrong = copy.deepcopy(named("cpu", "Deployment", "reft-gateway"))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_scales_by_keda_is_there_and_can_be_an_autoscaler(overlay: str) -> None:
    for scaled in objects(overlay, "ScaledObject"):
        spec = scaled["spec"]
        target = named(overlay, spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"])
        assert target["apiVersion"] == spec["scaleTargetRef"]["apiVersion"]
        assert "replicas" not in target["spec"], "an apply would set KEDA's number back"
        advanced = spec.get("advanced", {}).get("horizontalPodAutoscalerConfig", {})
        autoscaler = {
            "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "x"},
            "spec": {
                "scaleTargetRef": spec["scaleTargetRef"], "minReplicas": max(1, spec["minReplicaCount"]),
                "maxReplicas": spec["maxReplicaCount"], **advanced,
            },
        }  # fmt: skip
        kubernetes_validate.validate(autoscaler, VERSIONS[0], strict=True)
        for trigger in spec["triggers"]:
            assert all(isinstance(value, str) for value in trigger["metadata"].values())
            reference = trigger.get("authenticationRef")
            assert reference is None or named(overlay, "TriggerAuthentication", reference["name"])


@pytest.mark.parametrize("overlay", ["cuda", "multi-node"])
def test_prometheus_scrapes_what_keda_asks_for(overlay: str) -> None:
    for monitor in objects(overlay, "PodMonitor"):
        pods = [
            each for each in every(overlay) if selects(monitor["spec"]["selector"], each.labels)
        ]
        ports = {port["name"] for each in pods for port in each.container.get("ports", [])}
        assert {end["port"] for end in monitor["spec"]["podMetricsEndpoints"]} <= ports, monitor[
            "metadata"
        ]["name"]
    assert {each["metadata"]["name"] for each in objects(overlay, "PodMonitor")} == {
        "reft-gateway", "reft-engine", "reft-worker",
    }  # fmt: skip


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_restricted(overlay: str) -> None:
    (namespace,) = objects(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for each in every(overlay):
        pod, container = each.spec["securityContext"], each.container["securityContext"]
        assert pod["runAsNonRoot"] is True, each
        assert pod["runAsUser"] >= 10000, each
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, each
        assert container["allowPrivilegeEscalation"] is False, each
        assert container["readOnlyRootFilesystem"] is True, each
        assert container["capabilities"] == {"drop": ["ALL"]}, each
        assert not {"privileged", "runAsUser"} & container.keys(), each
        assert not {"hostNetwork", "hostPID", "hostIPC"} & each.spec.keys(), each
        allowed = {"emptyDir", "persistentVolumeClaim", "configMap", "secret"}
        assert all(set(volume) - {"name"} <= allowed for volume in each.spec.get("volumes", [])), (
            each
        )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_gets_a_token(overlay: str) -> None:
    accounts = {
        account["metadata"]["name"]: account for account in objects(overlay, "ServiceAccount")
    }
    for each in every(overlay):
        assert each.spec["automountServiceAccountToken"] is False, each
        assert accounts[each.spec["serviceAccountName"]]["automountServiceAccountToken"] is False, (
            each
        )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_has_limits_and_a_pinned_image_and_writes_only_to_volumes(
    overlay: str,
) -> None:
    for each in every(overlay):
        resources = each.container["resources"]
        for name in ("cpu", "memory"):
            assert resources["requests"][name], each
            assert resources["limits"][name], each
        image = each.container["image"]
        assert re.search(r"(:\d+\.\d+\.\d+|@sha256:[0-9a-f]{64})$", image), image
        mounts = {mount["name"]: mount for mount in each.container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in each.spec["volumes"]}, each
        assert "/tmp" in {mount["mountPath"] for mount in mounts.values()}, each
        for volume in each.spec["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], each


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_engines_only_read_the_store_and_every_process_sees_it_at_one_path(overlay: str) -> None:
    for each in every(overlay):
        mounts = {mount["name"]: mount for mount in each.container["volumeMounts"]}
        if each.component == "migration":
            continue
        assert mounts["store"]["mountPath"] == "/var/lib/reft-serve/adapters", each
        assert mounts["store"].get("readOnly", False) is (each.component == "engine"), each
        if each.component == "engine":
            assert mounts["shm"]["mountPath"] == "/dev/shm"
    claim = named(overlay, "PersistentVolumeClaim", "reft-store")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_mean_what_they_say(overlay: str) -> None:
    for each in every(overlay):
        container = each.container
        probes = {
            name: container[name]
            for name in ("startupProbe", "readinessProbe", "livenessProbe")
            if name in container
        }
        if each.component == "migration" or each.name == "reft-engine-group-worker":
            assert not probes, each  # a Job ends; a node without HTTP ends with its group
            continue
        assert "livenessProbe" in probes, each
        assert len(probes) == 3, each
        ports = {port["name"] for port in container["ports"]}
        assert {probe["httpGet"]["port"] for probe in probes.values()} <= ports
        if each.component in ("gateway", "worker"):
            assert probes["readinessProbe"]["httpGet"]["path"] == "/health/ready"
            assert probes["livenessProbe"]["httpGet"]["path"] == "/health/live"
        assert seconds(probes["livenessProbe"]) >= 60, "a moment's trouble must not end a process"
        assert seconds(probes["readinessProbe"]) <= 15
        if each.component == "engine":
            assert seconds(probes["startupProbe"]) >= 1200, (
                "a model takes its time to load and to compile"
            )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_has_the_time_that_its_drain_takes(overlay: str) -> None:
    for each in every(overlay):
        grace = each.spec.get("terminationGracePeriodSeconds", 30)
        if each.component == "gateway":
            given = named(overlay, "ConfigMap", "reft-gateway")["data"]
            notice, drain = float(given["REFT_NOTICE_SECONDS"]), float(given["REFT_DRAIN_SECONDS"])
            assert grace >= notice + 2 * drain + 10 + GRACE_SPARE
            # Twice unready, or one more endpoint's way through the cluster.
            assert notice >= seconds(each.container["readinessProbe"])
        if each.component == "worker":
            assert (
                grace
                >= float(named(overlay, "ConfigMap", "reft-worker")["data"]["REFT_DRAIN_SECONDS"])
                + GRACE_SPARE
            )
        if each.component == "engine":
            (timeout,) = [
                word for word in each.container["command"] if word.startswith("--shutdown-timeout=")
            ]
            hook = each.container["lifecycle"]["preStop"]
            wait = hook["sleep"]["seconds"] if "sleep" in hook else 0
            assert grace >= wait + int(timeout.partition("=")[2]) + GRACE_SPARE
            if "sleep" in hook:  # name servers remember for 5 s, and gateways look every 2 s
                assert wait >= 15
            else:
                compile(hook["exec"]["command"][2], "preStop", "exec")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_disruptions_are_bounded_and_replicas_are_spread(overlay: str) -> None:
    budgets = objects(overlay, "PodDisruptionBudget")
    for each in every(overlay):
        if each.component == "migration":
            continue
        (budget,) = [b for b in budgets if selects(b["spec"]["selector"], each.labels)]
        assert budget["spec"]["maxUnavailable"] == 1, each
    gateway = named(overlay, "Deployment", "reft-gateway")
    assert gateway["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    spread = gateway["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert {each["topologyKey"] for each in spread} == {
        "topology.kubernetes.io/zone",
        "kubernetes.io/hostname",
    }
    (autoscaler,) = objects(overlay, "HorizontalPodAutoscaler")
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == "reft-gateway"
    assert autoscaler["spec"]["minReplicas"] >= 2
    assert "replicas" not in gateway["spec"]


def peers(
    overlay: str, each: Workload, way: str
) -> list[tuple[list[Any] | None, list[Any] | None]]:
    """(whom, ports) of every rule that lets this workload's traffic through; None: anybody, any."""
    side, other = ("ingress", "from") if way == "in" else ("egress", "to")
    found = []
    for policy in objects(overlay, "NetworkPolicy"):
        if selects(policy["spec"]["podSelector"], each.labels):
            found += [(rule.get(other), rule.get("ports")) for rule in policy["spec"].get(side, [])]
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_passes_but_what_is_allowed(overlay: str) -> None:
    (deny,) = [
        p for p in objects(overlay, "NetworkPolicy") if p["metadata"]["name"] == "default-deny"
    ]
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    own = {p["metadata"]["name"] for p in objects(overlay, "NetworkPolicy")}
    for each in every(overlay):
        assert each.component in own, f"{each} has no NetworkPolicy of its own"
        for whom, ports in peers(overlay, each, "out"):
            if whom is None:
                assert {port["port"] for port in ports or [{"port": 0}]} <= PORTS_OUTSIDE, each
                assert each.component != "engine", "an engine reaches nobody outside"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_gateways_reach_engines(overlay: str) -> None:
    gateway = {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "gateway"}}}
    group = {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "engine"}}}
    prometheus = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
    }
    allowed = {
        "cpu": [gateway],
        "cuda": [gateway, prometheus],
        "multi-node": [gateway, prometheus, group],
    }[overlay]
    for each in every(overlay):
        if each.component == "engine":
            found = [peer for whom, _ in peers(overlay, each, "in") for peer in whom or [None]]
            assert sorted(found, key=str) == sorted(allowed, key=str)
        elif each.component != "gateway":
            assert not [whom for whom, _ in peers(overlay, each, "in") if whom != [prometheus]], (
                each
            )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_find_their_pods(overlay: str) -> None:
    for service in objects(overlay, "Service"):
        selector = service["spec"]["selector"]
        plain = {
            key: value for key, value in selector.items() if not key.startswith("leaderworkerset")
        }
        found = [each for each in every(overlay) if plain.items() <= each.labels.items()]
        assert found, service["metadata"]["name"]
        ports = {port["name"] for each in found for port in each.container.get("ports", [])}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    engines = named(overlay, "Service", "reft-engine")
    assert engines["spec"]["clusterIP"] == "None"
    given = named(overlay, "ConfigMap", "reft-gateway")["data"]["REFT_ENGINES"]
    assert given == f"dns+http://reft-engine:{engines['spec']['ports'][0]['port']}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_is_written_down(overlay: str) -> None:
    assert not objects(overlay, "Secret")
    for each in every(overlay):
        for variable in each.container.get("env", []):
            if re.search(r"KEY|PASSWORD|DATABASE|STORAGE|SECRET|TOKEN", variable["name"]):
                assert variable["valueFrom"]["secretKeyRef"]["name"] == "reft-serve", variable


@pytest.mark.parametrize("overlay", ["cuda", "multi-node"])
def test_gpus_are_asked_for(overlay: str) -> None:
    for each in every(overlay):
        if each.component in ("engine", "worker"):
            resources = each.container["resources"]
            assert (
                resources["limits"]["nvidia.com/gpu"]
                == resources["requests"]["nvidia.com/gpu"]
                >= 1
            ), each
            assert {
                "key": "nvidia.com/gpu",
                "operator": "Exists",
                "effect": "NoSchedule",
            } in each.spec["tolerations"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_files_lie_in_a_bucket_where_the_component_is_used(tmp_path: Path, overlay: str) -> None:
    deploy = os.path.relpath(ROOT / "deploy", tmp_path.resolve())
    own = {"resources": [f"{deploy}/overlays/{overlay}"], "components": [f"{deploy}/components/s3"]}
    (tmp_path / "kustomization.yaml").write_text(json.dumps(own))
    found = render(tmp_path)
    for each in found:
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, VERSIONS[0], strict=True)
    assert "reft-blobs" not in json.dumps(found)
    for name in ("reft-gateway", "reft-worker"):
        (container,) = next(
            each["spec"]["template"]["spec"]["containers"] for each in found
            if each["kind"] == "Deployment" and each["metadata"]["name"] == name
        )  # fmt: skip
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= {
            variable["name"] for variable in container["env"]
        }
        config = next(
            each["data"] for each in found
            if each["kind"] == "ConfigMap" and each["metadata"]["name"] == container["envFrom"][0]["configMapRef"]["name"]
        )  # fmt: skip
        assert config["REFT_BLOBS"].startswith("s3://")
        assert config["REFT_STORE"] == "/var/lib/reft-serve/adapters"
