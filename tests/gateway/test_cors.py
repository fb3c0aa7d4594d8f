"""Web pages of other origins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gateway.harness import Gateway, running

_PAGE = "https://app.example.com"
_ASK = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,x-stainless-os",
}


@pytest.fixture(scope="module")
def open_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("cors"), cors_origins=(_PAGE,)) as (gateway, _):
        yield gateway


def test_a_listed_origin_asks_without_a_key_and_reads_answers(open_gateway: Gateway) -> None:
    with open_gateway.http(None) as client:
        asked = client.options("/v1/chat/completions", headers={"origin": _PAGE, **_ASK})
        refused = client.get("/v1/models", headers={"origin": _PAGE})
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == _PAGE
    assert "authorization" in asked.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in asked.headers
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == _PAGE, "the page may read why"
    answer = open_gateway.admin.get("/v1/models", headers={"origin": _PAGE})
    assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_other_origins_get_what_callers_without_one_get(
    open_gateway: Gateway, tmp_path: Path
) -> None:
    with open_gateway.http(None) as client:
        asked = client.options(
            "/v1/chat/completions", headers={"origin": "https://evil.example", **_ASK}
        )
    assert asked.status_code == 401
    assert not [name for name in asked.headers if name.startswith("access-control")]


def test_it_is_off_by_default(gateway: Gateway) -> None:
    with gateway.http(None) as client:
        asked = client.options("/v1/chat/completions", headers={"origin": _PAGE, **_ASK})
    assert asked.status_code == 401
    assert not [name for name in asked.headers if name.startswith("access-control")]
