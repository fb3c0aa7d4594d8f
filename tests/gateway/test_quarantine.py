"""What a gateway remembers of requests that were in an engine when it ended."""

from __future__ import annotations

import pytest

from reft_serve.errors import RateLimited, RequestQuarantined
from reft_serve.gateway.engines import quarantine
from reft_serve.gateway.engines.quarantine import Quarantine, digest_of, is_plain

PATH = "/v1/completions"


def body(prompt: str = "x", **fields: object) -> dict[str, object]:
    return {"model": "base", "prompt": prompt, **fields}


def note(kept: Quarantine, tenant: str, prompt: str, *, alone: bool) -> bool:
    return kept.note(tenant, digest_of(tenant, PATH, body(prompt)), alone=alone)


def test_a_request_that_was_there_twice_is_quarantined_for_its_tenant_alone() -> None:
    kept = Quarantine()
    assert not note(kept, "one", "x", alone=False)
    kept.check("one", PATH, body())
    assert note(kept, "one", "x", alone=False)
    with pytest.raises(RequestQuarantined, match="60 min"):
        kept.check("one", PATH, body(user="other", stream=True))
    kept.check("one", PATH, body("y"))
    kept.check("two", PATH, body())


def test_a_request_that_was_answered_is_no_suspect_any_more() -> None:
    kept = Quarantine()
    note(kept, "one", "x", alone=False)
    kept.clear("one", PATH, body())
    assert not note(kept, "one", "x", alone=False)


def test_a_quarantine_ends_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Quarantine()
    monkeypatch.setattr(quarantine, "QUARANTINE_ENTRIES", 2)
    monkeypatch.setattr(quarantine, "LONE_ENDS", 100)
    for k in range(3):
        note(kept, "one", str(k), alone=True)
    kept.check("one", PATH, body("0"))
    with pytest.raises(RequestQuarantined):
        kept.check("one", PATH, body("2"))
    monkeypatch.setattr(quarantine, "QUARANTINE_SECONDS", -1)
    note(kept, "one", "2", alone=True)
    kept.check("one", PATH, body("2"))


def test_a_tenant_that_ended_engines_alone_with_ever_new_requests_has_to_wait() -> None:
    kept = Quarantine()
    for k in range(quarantine.LONE_ENDS):
        kept.check("one", PATH, body("fresh"))
        note(kept, "one", str(k), alone=True)
    with pytest.raises(RateLimited, match="3 engines crashed"):
        kept.check("one", PATH, body("fresh"))
    kept.check("two", PATH, body("fresh"))


def test_only_small_requests_without_special_fields_are_plain() -> None:
    assert is_plain(body(max_tokens=5, temperature=0.5, stream=True), 100)
    assert not is_plain(body(), quarantine.PLAIN_BYTES + 1)
    for fields in (
        {"tools": []},
        {"response_format": {}},
        {"logit_bias": {}},
        {"n": 2},
        {"structured_outputs": {}},
    ):
        assert not is_plain(body(**fields), 100)
