"""Inference through the gateway, with the `openai` client and a fake engine: what reaches the engine, what comes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Tenant, take, usage_of
from tests.support.gateway.strict import strict
from tests.support.waiting import wait_for

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]


def test_every_name_of_an_adapter_reaches_the_engine_under_an_opaque_one(
    engine: FakeEngine, tenant: Tenant
) -> None:
    full = tenant.upload("birds").json()["model"]
    said = {tenant.say(name) for name in ("birds", "birds@1", f"{tenant.name}/birds", full)}
    assert len(said) == 1
    assert said != {tenant.say("base")}
    (name,) = {request["model"] for request in engine.requests[-5:-1]}
    assert name.startswith("reft-v-")
    assert "birds" not in name
    assert tenant.name not in name


def test_the_answer_says_the_name_that_was_asked_for(engine: FakeEngine, tenant: Tenant) -> None:
    tenant.upload("birds")
    raw = tenant.http.post("/v1/completions", json={"model": "birds@1", "prompt": "x"})
    assert raw.json()["model"] == "birds@1"
    assert raw.headers["x-reft-version"] == "birds@1"
    assert "reft-v-" not in raw.text
    streamed = tenant.http.post(
        "/v1/chat/completions", json={"model": "birds", "messages": HELLO, "stream": True}
    )
    assert "reft-v-" not in streamed.text
    assert {json.loads(line[6:])["model"] for line in streamed.text.split("\n\n")[:-2]} == {"birds"}


def test_every_sampling_field_reaches_the_engine_as_it_was_given(
    engine: FakeEngine, tenant: Tenant
) -> None:
    given: dict[str, Any] = {
        "n": 2, "stop": ["a", "b"], "seed": 7, "logprobs": True, "top_logprobs": 3, "logit_bias": {"5": -1.5},
        "max_tokens": 4,
        "temperature": 0.5, "top_p": 0.9, "frequency_penalty": 0.1, "presence_penalty": -0.1,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "tool_choice": "auto",
        "response_format": {"type": "json_object"},
    }  # fmt: skip
    tenant.openai.chat.completions.create(
        model="base", messages=HELLO, extra_body={"top_k": 5, "min_p": 0.1}, **given
    )
    sent = engine.requests[-1]
    assert {name: sent[name] for name in given} == given
    assert (sent["top_k"], sent["min_p"], sent["messages"]) == (5, 0.1, HELLO)


@pytest.mark.parametrize("wants_usage", [True, False])
@pytest.mark.parametrize("choices", [1, 3])
def test_a_stream_tells_usage_only_where_it_is_asked_for(
    tenant: Tenant, wants_usage: bool, choices: int
) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if wants_usage else {}
    stream = tenant.openai.chat.completions.create(
        model="base", messages=HELLO, stream=True, max_tokens=5, n=choices, **options
    )
    chunks = list(stream)
    told = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert [usage.completion_tokens for usage in told] == ([5 * choices] if wants_usage else [])
    assert all(chunk.choices for chunk in chunks) is not wants_usage
    whole = tenant.openai.chat.completions.create(
        model="base", messages=HELLO, max_tokens=5, n=choices
    )
    for k in range(choices):
        pieces = [c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == k]
        assert "".join(pieces) == whole.choices[k].message.content


def test_responses_are_answered_and_streamed(engine: FakeEngine, tenant: Tenant) -> None:
    tenant.upload("birds")
    whole = tenant.openai.responses.create(model="birds", input="hello there", max_output_tokens=4)
    events = list(
        tenant.openai.responses.create(
            model="birds", input="hello there", max_output_tokens=4, stream=True
        )
    )
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == whole.output_text != ""
    assert events[-1].response.model == whole.model == "birds"
    assert engine.requests[-1]["store"] is False
    (counted,) = usage_of(tenant, "endpoint")
    assert (counted["requests"], counted["completion_tokens"]) == (2, 8)


def test_texts_are_embedded_where_the_engine_can(engine: FakeEngine, tenant: Tenant) -> None:
    tenant.upload("birds")
    create = tenant.openai.embeddings.create
    both = strict(create(model="birds", input=["a b", "c"], encoding_format="float"))
    assert [each.index for each in both.data] == [0, 1]
    assert both.model == "birds"
    plain = strict(create(model="birds", input="a b"))  # the client asks for base64, and decodes it
    assert engine.requests[-1]["encoding_format"] == "base64"
    assert plain.data[0].embedding == pytest.approx(both.data[0].embedding)
    assert (
        strict(
            create(model="birds", input=[[5, 6], [7]], encoding_format="float")
        ).usage.prompt_tokens
        == 3
    )
    assert {counted["group"]["endpoint"] for counted in usage_of(tenant, "endpoint")} == {
        "embeddings"
    }
    engine.embeds = False
    with pytest.raises(openai.BadRequestError, match="does not serve this endpoint"):
        create(model="birds", input="a b")


def test_a_base_without_a_chat_template_says_what_to_do(engine: FakeEngine, tenant: Tenant) -> None:
    engine.has_chat_template = False
    for stream in (False, True):
        with pytest.raises(
            openai.BadRequestError, match=r"has no chat template.*--chat-template FILE"
        ) as caught:
            tenant.openai.chat.completions.create(model="base", messages=HELLO, stream=stream)
        assert caught.value.param == "messages"
    assert tenant.say("base")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cache_salt", "guess"), ("request_id", "x"), ("priority", -9), ("kv_transfer_params", {}),
        ("chat_template", "{{x}}"),
        ("vllm_xargs", {}), ("mm_processor_kwargs", {}), ("media_io_kwargs", {}), ("prompt_embeds", "x"),
        ("lora_request", {}), ("documents", []), ("return_token_ids", True), ("truncate_prompt_tokens", 3),
    ],
)  # fmt: skip
def test_what_could_touch_other_requests_is_refused(
    engine: FakeEngine, tenant: Tenant, field: str, value: object
) -> None:
    before = engine.counts["requests"]
    with pytest.raises(openai.BadRequestError) as caught:
        tenant.openai.chat.completions.create(
            model="base", messages=HELLO, extra_body={field: value}
        )
    assert caught.value.param == field
    assert engine.counts["requests"] == before


def test_each_tenant_has_a_cache_salt_of_its_own(
    engine: FakeEngine, make_tenant: Callable[..., Tenant]
) -> None:
    salts = []
    for each in (make_tenant(), make_tenant()):
        each.say("base")
        each.openai.chat.completions.create(model="base", messages=HELLO)
        each.openai.responses.create(model="base", input="x")
        each.openai.embeddings.create(model="base", input="x")
        each.http.post("/v1/classify", json={"model": "base", "input": "x"})
        (salt,) = {request["cache_salt"] for request in engine.requests[-5:]}
        salts.append(salt)
        assert len(salt) >= 43
        assert salt not in each.http.get("/v1/tenant").text
    assert salts[0] != salts[1]


def test_unknown_and_forbidden_models_look_the_same(make_tenant: Callable[..., Tenant]) -> None:
    owner, other = make_tenant(), make_tenant()
    full = owner.upload("birds").json()["model"]

    def failure(name: str) -> tuple[int, str]:
        answer = other.http.post("/v1/completions", json={"model": name, "prompt": "x"})
        return answer.status_code, answer.text.replace(name, "NAME")

    absent = failure("nothing")
    assert absent[0] == 404
    for name in ("birds", "birds@1", f"{owner.name}/birds", full):
        assert failure(name) == absent
        assert other.http.get(f"/v1/models/{name}").status_code == 404
        assert other.http.delete(f"/v1/models/{name}").status_code == 404
    assert owner.say("birds")


def test_a_shared_adapter_is_used_until_it_is_taken_back(
    make_tenant: Callable[..., Tenant],
) -> None:
    owner, guest = make_tenant(), make_tenant()
    owner.upload("birds")
    name = f"{owner.name}/birds"
    assert owner.http.put(f"/v1/adapters/birds/shares/{guest.id}").json()["shared_with"] == [
        guest.name
    ]
    assert guest.say(name) == owner.say("birds")
    assert name in {model.id for model in guest.openai.models.list()}
    assert guest.http.delete(f"/v1/models/{name}").status_code == 404
    assert owner.http.delete(f"/v1/adapters/birds/shares/{guest.id}").status_code == 200
    with pytest.raises(openai.NotFoundError):
        guest.say(name)


def test_models_are_only_those_that_the_caller_may_use(make_tenant: Callable[..., Tenant]) -> None:
    one, two = make_tenant(), make_tenant()
    full = one.upload("birds", alias="production").json()["model"]
    assert [model.id for model in one.openai.models.list()] == [
        "base",
        "birds",
        "birds@production",
        full,
    ]
    assert [model.id for model in two.openai.models.list()] == ["base"]
    for name in ("birds", "birds@1", "birds@production", full):
        assert one.openai.models.retrieve(name).id == name
    text = one.http.get("/v1/models").text
    assert "/" not in text.replace("application/json", "")


def test_a_fine_tuned_model_is_deleted_by_its_owner(tenant: Tenant) -> None:
    first, _ = tenant.upload("birds", 1).json()["model"], tenant.upload("birds", 2)
    assert tenant.openai.models.delete(first).deleted is True
    assert tenant.http.get("/v1/adapters/birds").json()["versions"][0]["version"] == 2
    assert tenant.openai.models.delete("birds").deleted is True
    with pytest.raises(openai.NotFoundError):
        tenant.say("birds")
    with pytest.raises(openai.PermissionDeniedError):
        tenant.openai.models.delete("base")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (422, openai.BadRequestError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
def test_an_engines_errors_come_in_our_shape(
    engine: FakeEngine, tenant: Tenant, status: int, kind: type[openai.APIStatusError]
) -> None:
    tenant.upload("birds")
    engine.fail_with = status
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            tenant.openai.completions.create(model="birds", prompt="x", stream=stream)
        body: Any = caught.value.body
        assert set(body) == {"message", "type", "param", "code"}
        assert "reft-v-" not in str(body)


def test_an_error_inside_a_stream_is_an_event_that_the_client_raises(
    engine: FakeEngine, tenant: Tenant
) -> None:
    engine.break_after = 3
    pieces: list[Any] = []
    with pytest.raises(openai.APIError, match="failed to process"):
        take(
            tenant.openai.completions.create(model="base", prompt="x", stream=True, max_tokens=8),
            pieces,
        )
    assert len(pieces) == 3
    engine.break_after = None
    (counted,) = usage_of(tenant, "status")
    assert (counted["group"]["status"], counted["completion_tokens"]) == ("failed", 3)


def test_an_error_before_the_first_token_is_an_ordinary_one(
    engine: FakeEngine, tenant: Tenant
) -> None:
    engine.break_after = 0
    with pytest.raises(openai.InternalServerError):
        tenant.openai.completions.create(model="base", prompt="x", stream=True)


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_leaves_cancels_the_engines_request(
    engine: FakeEngine, tenant: Tenant, stream: bool
) -> None:
    engine.token_seconds = 0.05
    before = engine.counts["cancelled"]
    body = {"model": "base", "prompt": "x", "max_tokens": 400, "stream": stream}
    if stream:
        with tenant.http.stream("POST", "/v1/completions", json=body) as answer:
            seen = next(answer.iter_text()).count('"text"')
    else:
        with pytest.raises(httpx.ReadTimeout):
            tenant.http.post("/v1/completions", json=body, timeout=0.5)
        seen = 0
    wait_for(lambda: engine.counts["cancelled"] == before + 1 and engine.running == 0)
    wait_for(lambda: bool(usage_of(tenant)) and usage_of(tenant)[0]["requests"] == 1)
    (counted,) = usage_of(tenant, "status")
    assert counted["group"]["status"] == "cancelled"
    assert max(1, seen) <= counted["completion_tokens"] < 30


def test_usage_is_exact_by_key_version_and_endpoint(tenant: Tenant) -> None:
    tenant.upload("birds")
    for tokens, stream in ((3, False), (5, True)):
        answer = tenant.openai.completions.create(
            model="birds", prompt="a b c", max_tokens=tokens, stream=stream
        )
        assert not stream or list(answer)
    tenant.openai.chat.completions.create(model="base", messages=HELLO, max_tokens=2, n=2)
    found = {
        (u["group"]["model"], u["group"]["endpoint"]): u
        for u in usage_of(tenant, "model", "endpoint")
    }
    birds, base = found["birds", "completions"], found["base", "chat"]
    assert (birds["requests"], birds["prompt_tokens"], birds["completion_tokens"]) == (2, 6, 8)
    assert (base["requests"], base["completion_tokens"]) == (1, 4)
    text = tenant.http.get("/v1/usage?format=csv&bucket=day&group_by=model").text.splitlines()
    assert text[0] == "start_time,model,requests,prompt_tokens,cached_tokens,completion_tokens"
    assert len(text) == 3


def test_an_unreadable_body_gets_a_sentence(tenant: Tenant) -> None:
    for content in (
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'"x"',
        b"null",
        b'{"model": "base"}',
        b'{"model": "base", "prompt": NaN}',
    ):
        answer = tenant.http.post(
            "/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400, content
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_whole_number_may_have_a_point(engine: FakeEngine, tenant: Tenant) -> None:
    body = {"model": "base", "prompt": [5.0, 6], "max_tokens": 2.0, "seed": 7.0, "n": 1.0}
    assert tenant.http.post("/v1/completions", json=body).status_code == 200
    sent = engine.requests[-1]
    assert all(
        type(each) is int for each in (*sent["prompt"], sent["max_tokens"], sent["seed"], sent["n"])
    )
    for wrong in (2.5, True, "2", float("1e400")):
        answer = tenant.http.post(
            "/v1/completions", content=json.dumps(body | {"max_tokens": wrong})
        )
        assert answer.status_code == 400, wrong


def test_a_request_that_is_too_large_is_refused_before_it_is_read(
    gateway: Gateway, tenant: Tenant
) -> None:
    text = "x" * (gateway.settings.max_request_bytes + 10)
    assert (
        tenant.http.post("/v1/completions", json={"model": "base", "prompt": text}).status_code
        == 413
    )

    def pieces() -> Any:
        yield b'{"model": "base", "prompt": "'
        for _ in range(100):
            yield b"x" * 100_000

    try:
        answer = tenant.http.post(
            "/v1/completions", content=pieces(), headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413
    except httpx.WriteError:
        pass  # the answer was there before the request's end


def test_an_engine_that_forgot_a_version_is_given_it_again(
    engine: FakeEngine, tenant: Tenant
) -> None:
    tenant.upload("birds")
    said = tenant.say("birds")
    engine.adapters.clear()
    assert tenant.say("birds") == said
    assert len(engine.adapters) == 1
