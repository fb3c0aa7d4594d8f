"""Dashboard, alert rules and scrape configuration: sound in themselves. That their metrics exist is
told by a running engine, in tests/gateway/test_conformance.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from reft_serve import observability
from tests.support.deploy.expressions import (
    ALERTS,
    DEPLOY,
    Asked,
    alerts,
    asked,
    panels,
    selectors,
    unmet,
)

ROOT = DEPLOY.parent
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not here: Debian's package `prometheus` has it"
)


@pytest.mark.parametrize("expression", asked(), ids=lambda asked: asked.where)
def test_every_expression_is_promql_and_reads_a_metric(expression: Asked) -> None:
    assert selectors(expression)


def test_a_metric_a_label_or_a_value_that_is_not_there_is_found() -> None:
    page = 'reft_requests_total{route="/v1",status="200"} 1\n'
    told = unmet([page])
    assert any(line.startswith("Queue: no sample of vllm:num_requests_waiting") for line in told)
    assert any("ReftErrors" in line and "5.." in line for line in told)
    assert not [
        line for line in unmet([page], seldom=frozenset({"status"})) if "ReftErrors" in line
    ]
    assert any(line.startswith("Requests:") and "tenant" in line for line in told)


def test_a_workers_page_has_what_is_asked_of_it() -> None:
    # its metrics are declared there, and its page is what this process would show
    assert observability.WORKER_READY
    assert (
        unmet([generate_latest().decode()], of=lambda metric: metric.startswith("reft_worker_"))
        == []
    )
    assert unmet([], of=lambda metric: metric.startswith("reft_worker_"))


def test_panels_do_not_overlap_and_say_what_they_show() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels():
        assert panel["description"]
        assert panel["title"]
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for cell in [
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        ]:
            assert cell not in taken, (panel["title"], taken[cell])
            taken[cell] = panel["title"]
    assert len({panel["id"] for panel in panels()}) == len(panels())


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_has_a_severity_a_summary_and_a_page_that_says_what_to_do(
    rule: dict[str, dict[str, str]],
) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"].endswith(".")
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]


def test_the_runbook_tells_of_no_alert_that_is_gone() -> None:
    headings = re.findall(
        r"^## (Reft\w+)$", (ROOT / "docs" / "runbook-alerts.md").read_text(), re.MULTILINE
    )
    assert sorted(headings) == sorted(str(rule["alert"]) for rule in alerts())


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    cases = yaml.safe_load(ALERTS.with_name("alerts.test.yml").read_text())["tests"]
    fired = {
        check["alertname"]
        for case in cases
        for check in case["alert_rule_test"]
        if check["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in alerts()}


@needs_promtool
@pytest.mark.parametrize(
    ("what", "file"), [("check", "alerts.yml"), ("test", "alerts.test.yml")], ids=["check", "test"]
)
def test_promtool_takes_the_rules(what: str, file: str) -> None:
    _promtool(what, "rules", ALERTS.with_name(file))


@needs_promtool
def test_promtool_takes_the_scrape_configuration(tmp_path: Path) -> None:
    # The key's file is looked for: it is there where it is used.
    key = tmp_path / "key"
    key.touch()
    config = (
        ALERTS.with_name("prometheus.yml")
        .read_text()
        .replace("/etc/prometheus/secrets/gateway-key", str(key))
    )
    (tmp_path / "prometheus.yml").write_text(config)
    shutil.copy(ALERTS, tmp_path)
    _promtool("check", "config", tmp_path / "prometheus.yml")


def _promtool(*command: object) -> None:
    assert PROMTOOL is not None
    ended = subprocess.run(
        [PROMTOOL, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ALERTS.parent,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_prometheus_asks_the_services_of_the_compose_file_at_their_ports() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    config = yaml.safe_load(ALERTS.with_name("prometheus.yml").read_text())
    targets = {
        job["job_name"]: job["static_configs"][0]["targets"][0] for job in config["scrape_configs"]
    }
    for kind in ("gateway", "engine", "worker"):
        name, port = targets[f"reft-{kind}"].split(":")
        mine = [each for each in services.values() if name in _names(services, each)]
        assert mine, f"no service is called {name}"
        assert all(port in " ".join(each["command"]) for each in mine)


def _names(services: dict[str, Any], service: dict[str, Any]) -> set[str]:
    own = {name for name, each in services.items() if each is service}
    networks = service.get("networks", {})
    given = networks.values() if isinstance(networks, dict) else []
    return own | {alias for each in given if each for alias in each.get("aliases", [])}


def test_grafana_finds_the_dashboard_and_prometheus_where_they_are_mounted() -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((folder / "dashboards" / "reft-serve.yml").read_text())[
        "providers"
    ]
    assert provider["options"]["path"] == "/etc/grafana/dashboards"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
