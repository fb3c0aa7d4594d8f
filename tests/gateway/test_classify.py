"""POST /v1/classify: vLLM's shape, for tenants."""

from __future__ import annotations

import pytest

from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Tenant, usage_of


@pytest.fixture
def birds(tenant: Tenant) -> Tenant:
    tenant.upload("birds")
    return tenant


def test_texts_and_pairs_are_classified_and_counted(engine: FakeEngine, birds: Tenant) -> None:
    both = birds.http.post("/v1/classify", json={"model": "birds", "input": ["a b", "c"]})
    assert both.status_code == 200
    told = both.json()
    assert (told["model"], [each["index"] for each in told["data"]]) == ("birds", [0, 1])
    assert all(
        sum(each["probs"]) == pytest.approx(1) and each["num_classes"] == 2 for each in told["data"]
    )
    assert told["usage"]["prompt_tokens"] == 3
    pair = birds.http.post(
        "/v1/classify",
        json={"model": "birds", "input": "a", "text_pair": "b", "use_activation": False},
    )
    assert pair.status_code == 200
    sent = engine.requests[-1]
    assert (sent["text_pair"], sent["use_activation"]) == ("b", False)
    (counted,) = usage_of(birds, "endpoint")
    assert (counted["group"]["endpoint"], counted["requests"], counted["prompt_tokens"]) == (
        "classify",
        2,
        4,
    )


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"input": []}, "at least 1"),
        ({"input": ["a"] * 10_000}, "at most 2048"),
        ({"input": ["a", "b"], "text_pair": ["c"]}, "as many texts"),
        ({"input": "a", "text_pair": ["c"]}, "a text where input is one"),
        ({"input": [1, 2], "text_pair": ["c", "d"]}, "not tokens"),
        ({"input": "a", "task": "embed"}, "task"),
        ({}, "input"),
    ],
    ids=[
        "no text",
        "10,000 texts",
        "pairs of other number",
        "a list for a text",
        "pairs of tokens",
        "a field",
        "nothing",
    ],
)
def test_what_is_no_request_is_told(birds: Tenant, body: dict[str, object], told: str) -> None:
    answer = birds.http.post("/v1/classify", json={"model": "birds", **body})
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]
    assert birds.http.post("/v1/classify", json={"model": "birds", "input": ""}).status_code == 200


def test_an_engine_that_does_not_pool_refuses(engine: FakeEngine, birds: Tenant) -> None:
    engine.embeds = False
    answer = birds.http.post("/v1/classify", json={"model": "birds", "input": "a"})
    assert answer.status_code == 400
    assert "does not serve this endpoint" in answer.json()["error"]["message"]
