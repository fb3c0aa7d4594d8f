"""The OpenAPI document is true: no answer differs from what it says, whatever is asked."""

from __future__ import annotations

from pathlib import Path

from tests.support.gateway.harness import Gateway, running
from tests.support.gateway.links import with_links
from tests.support.gateway.openapi_judge import ROTATION, furnish, judge


def test_every_answer_is_what_the_document_says(tmp_path: Path) -> None:
    """A short run; `scripts/bench openapi` makes a long one."""
    with running(tmp_path, webhooks_to_private_addresses=True) as (gateway, (engine,)):
        engine.remember = False
        known = furnish(gateway.admin)
        cases = judge(
            gateway.url, gateway.admin_key, 3, tmp_path, known, "--exclude-path-regex", ROTATION
        )
        assert gateway.admin.get("/v1/tenant").status_code == 200, (
            "the key died, so what came after shows nothing"
        )
        spare = gateway.admin.post("/v1/keys", json={"role": "admin"}).json()["secret"]
        cases += judge(gateway.url, spare, 3, tmp_path, known, "--include-path-regex", ROTATION)
        print(f"{cases} cases")
        assert cases > 1000


def test_every_link_leads_to_an_operation_with_such_parameters(gateway: Gateway) -> None:
    paths = with_links(gateway.admin.get("/openapi.json").json())["paths"]
    operations = {
        operation["operationId"]: operation
        for path in paths.values()
        for operation in path.values()
    }
    links = [
        link
        for operation in operations.values()
        for answer in operation["responses"].values()
        for link in answer.get("links", {}).values()
    ]
    assert len(links) >= 15
    for link in links:
        found = operations[link["operationId"]]
        assert set(link["parameters"]) == {
            each["name"] for each in found.get("parameters", []) if each["required"]
        }
        assert ("requestBody" in link) <= ("requestBody" in found)
