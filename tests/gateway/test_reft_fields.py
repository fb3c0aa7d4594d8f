"""The fields of ours in inference requests, with a fake engine: bounded, and in the engine's own words."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from reft_serve.config import GatewaySettings, read_settings
from reft_serve.errors import ServiceError
from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Tenant, running

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
ASKS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"}, "/v1/chat/completions": {"messages": HELLO}, "/v1/responses": {"input": "x"},
}  # fmt: skip


def post(tenant: Tenant, path: str, **more: Any) -> Any:
    content = json.dumps({"model": "birds", **ASKS[path], **more})
    return tenant.http.post(path, content=content, headers={"content-type": "application/json"})


@pytest.fixture
def owner(tenant: Tenant) -> Tenant:
    assert tenant.upload("birds").status_code == 201
    return tenant


@pytest.mark.parametrize("path", ASKS)
def test_a_strength_reaches_the_engines_plugin(
    engine: FakeEngine, owner: Tenant, path: str
) -> None:
    for strength in (0, -0.0, 0.5, -2, 100):
        assert post(owner, path, reft_strength=strength).status_code == 200
        assert engine.requests[-1]["vllm_xargs"] == {"reft_strength": strength}
        assert "reft_strength" not in engine.requests[-1]
    assert post(owner, path, reft_strength=None).status_code == 200
    assert "vllm_xargs" not in engine.requests[-1]
    assert post(owner, path, reft_strength=3, model="base").status_code == 200
    assert "vllm_xargs" not in engine.requests[-1]  # the base has no edits


def test_the_openai_client_sends_ours_as_extra_body(engine: FakeEngine, owner: Tenant) -> None:
    given: Any = {"reft_strength": 0.5, "reft_prompt_tokens": 3}
    owner.openai.completions.create(model="birds", prompt=[5, 6, 7, 8], extra_body=given)
    assert engine.requests[-1]["vllm_xargs"] == given


@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize("strength", [100.1, -1e9, 1e400, float("nan"), "1", True, [1], {}])
def test_a_strength_that_is_no_factor_is_refused(
    engine: FakeEngine, owner: Tenant, path: str, strength: Any
) -> None:
    before = engine.counts["requests"]
    answer = post(owner, path, reft_strength=strength)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "reft_strength"
    assert engine.counts["requests"] == before


@pytest.mark.parametrize(
    ("prompt", "ends"),
    [
        ("one text", 1),
        ([5, 6, 7], 3),
        ([[5, 6], [7]], [1, 1]),
        (["a b", "c"], [2, 1]),
        (["a b", "c"], 1),
    ],
)
def test_the_ends_of_prompts_reach_the_engines_plugin(
    engine: FakeEngine, owner: Tenant, prompt: Any, ends: Any
) -> None:
    assert post(owner, "/v1/completions", prompt=prompt, reft_prompt_tokens=ends).status_code == 200
    assert engine.requests[-1]["vllm_xargs"] == {"reft_prompt_tokens": ends}


@pytest.mark.parametrize(
    ("prompt", "ends"),
    [
        ([5, 6, 7], 4), ([5, 6, 7], 0), ([5, 6, 7], -1), ("x", "1"), ("x", 1.5), ("x", True), ("x", []), ("x", [1, 1]),
        (["a", "b"], [1]), ([[5, 6], [7]], [1, 2]), ([[5, 6], [7]], 2), ("x", [None]), ("x", 1 << 40),
    ],
)  # fmt: skip
def test_ends_that_are_none_are_refused(
    engine: FakeEngine, owner: Tenant, prompt: Any, ends: Any
) -> None:
    before = engine.counts["requests"]
    answer = post(owner, "/v1/completions", prompt=prompt, reft_prompt_tokens=ends)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("reft_prompt_tokens")
    assert engine.counts["requests"] == before


def test_a_scored_answer_without_the_prompts_end_carries_a_warning(owner: Tenant) -> None:
    scoring = {"echo": True, "logprobs": 1, "max_tokens": 1}
    for stream in (False, True):
        warned = post(owner, "/v1/completions", **scoring, stream=stream).headers["x-reft-warning"]
        assert "send reft_prompt_tokens" in warned
        assert "birds@1" in warned
    for fields in (
        scoring | {"reft_prompt_tokens": 1}, scoring | {"model": "base"}, scoring | {"echo": False},
        scoring | {"logprobs": None},
    ):  # fmt: skip
        assert "x-reft-warning" not in post(owner, "/v1/completions", **fields).headers


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_the_chat_template_is_given_what_is_allowed(
    engine: FakeEngine, tenant: Tenant, path: str
) -> None:
    given = {"enable_thinking": False, "thinking": True}
    assert (
        post(tenant, path, model="base", chat_template_kwargs={**given, "x": None}).status_code
        == 200
    )
    assert engine.requests[-1]["chat_template_kwargs"] == given
    before = engine.counts["requests"]
    for wrong in (
        {"chat_template": "{{x}}"}, {"add_generation_prompt": False}, {"tools": []}, {"documents": [{"url": "http://x/"}]},
        {"enable_thinking": {"a": 1}}, {"enable_thinking": ["x"]}, {"enable_thinking": "x" * 257}, {"other": 1}, [], "x",
        {f"n{k}": 1 for k in range(17)},
    ):  # fmt: skip
        answer = post(tenant, path, model="base", chat_template_kwargs=wrong)
        assert answer.status_code == 400, wrong
        assert answer.json()["error"]["param"].startswith("chat_template_kwargs"), wrong
    assert engine.counts["requests"] == before


def test_an_operator_allows_other_arguments_and_bounds_the_strength(tmp_path: Any) -> None:
    with running(tmp_path, chat_template_kwargs="reasoning_budget", max_strength=2) as (
        gateway,
        (engine,),
    ):
        tenant = gateway.tenant("one")
        tenant.upload("birds")
        budget: Any = {"chat_template_kwargs": {"reasoning_budget": 5}}
        tenant.openai.chat.completions.create(
            model="birds", messages=HELLO, extra_body=budget | {"reft_strength": -2}
        )
        assert engine.requests[-1]["chat_template_kwargs"] == {"reasoning_budget": 5}
        for wrong in ({"chat_template_kwargs": {"enable_thinking": True}}, {"reft_strength": 2.1}):
            with pytest.raises(openai.BadRequestError):
                tenant.openai.chat.completions.create(
                    model="birds", messages=HELLO, extra_body=wrong
                )


@pytest.mark.parametrize("name", ["chat_template", "tools", "add_generation_prompt", "tokenize"])
def test_what_decides_what_is_rendered_cannot_be_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("REFT_CHAT_TEMPLATE_KWARGS", f"thinking, {name}")
    with pytest.raises(ServiceError, match=name):
        read_settings(GatewaySettings)
