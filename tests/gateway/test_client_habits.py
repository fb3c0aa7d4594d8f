"""What clients and frameworks send beside what they ask for: nulls, marks, and references that no engine may follow."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import openai
import pytest
from openai.types import (
    chat,
    completion_create_params,
    embedding_create_params,
    responses,
    shared_params,
)
from openai.types.responses import response_input_item_param
from pydantic import ValidationError

from reft_serve.gateway.schemas import inference, messages
from reft_serve.gateway.schemas.client_fields import IGNORED, REFUSED
from reft_serve.gateway.schemas.inference import (
    ChatBody,
    ClassifyBody,
    CompletionBody,
    EmbeddingBody,
    ResponseBody,
)
from reft_serve.gateway.schemas.request_model import RequestModel
from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Tenant

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "default": None}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BODIES: dict[str, tuple[type[RequestModel], dict[str, Any]]] = {
    "/v1/completions": (
        CompletionBody,
        {"model": "base", "prompt": "x", "stream_options": {}, "metadata": {}},
    ),
    "/v1/chat/completions": (
        ChatBody,
        {
            "model": "base",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
                {"role": "user", "content": "hello", "name": "ann"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "5"}]},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            ],
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "metadata": {},
        },
    ),
    "/v1/responses": (
        ResponseBody,
        {
            "model": "base",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "a"}],
                },
                {
                    "type": "reasoning",
                    "id": "rs_1",
                    "summary": [{"type": "summary_text", "text": "b"}],
                },
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                {
                    "type": "function_call_output",
                    "call_id": "c1",
                    "output": [{"type": "input_text", "text": "c"}],
                },
                {"type": "custom_tool_call", "call_id": "c2", "name": "g", "input": "d"},
                {
                    "type": "custom_tool_call_output",
                    "call_id": "c2",
                    "output": [{"type": "input_text", "text": "e"}],
                },
            ],
            "tools": [
                {"type": "function", "name": "f", "parameters": {}},
                {"type": "custom", "name": "g"},
            ],
            "tool_choice": {"type": "function", "name": "f"},
            "reasoning": {"effort": "low"},
            "text": {"format": {"type": "text"}},
        },
    ),
    "/v1/embeddings": (EmbeddingBody, {"model": "base", "input": "x"}),
    "/v1/classify": (ClassifyBody, {"model": "base", "input": "x", "text_pair": "y"}),
}
# Objects whose members are the caller's own: JSON schemas, grammars, and names that nothing is fetched by.
OWN = ("parameters", "format", "metadata")


def places(body: Any, own: tuple[str, ...] = OWN) -> Iterator[tuple[str | int, ...]]:
    """The paths of all objects and lists of a body."""
    if isinstance(body, dict | list):
        yield ()
        items = body.items() if isinstance(body, dict) else enumerate(body)
        for name, value in items:
            if name not in own:
                yield from ((name, *rest) for rest in places(value, own))


def at(body: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        body = body[step]
    return body


def post(tenant: Tenant, path: str, body: Any) -> Any:
    return tenant.http.post(
        path, content=json.dumps(body), headers={"content-type": "application/json"}
    )


@pytest.mark.parametrize("path", BODIES)
def test_null_is_not_given_in_any_object_whatever_the_field(
    engine: FakeEngine, tenant: Tenant, path: str
) -> None:
    kind, body = BODIES[path]
    nulls = {name for name, field in kind.model_fields.items() if not field.is_required()} - set(
        body
    )
    nulls |= set(REFUSED) - set(kind.model_fields) | {"audio", "nobody_knows_it"}
    assert post(tenant, path, body).status_code == 200
    plain = engine.requests[-1]
    sent = copy.deepcopy(body) | dict.fromkeys(nulls)
    for place in places(body):
        if isinstance(at(sent, place), dict):
            at(sent, place).update(nobody_knows_it=None, function_call=None)
    answer = post(tenant, path, sent)
    assert answer.status_code == 200, answer.text
    assert without_id(engine.requests[-1]) == without_id(plain)


@pytest.mark.parametrize("path", BODIES)
def test_an_unknown_field_is_refused_by_its_name_in_any_object(path: str) -> None:
    kind, body = BODIES[path]
    for place in places(body):
        sent = copy.deepcopy(body)
        if isinstance(at(sent, place), dict):
            at(sent, place)["nobody_knows_it"] = 1
            with pytest.raises(ValidationError, match="nobody_knows_it"):
                kind.model_validate_json(json.dumps(sent))


def test_null_has_its_own_meaning_inside_a_schema(engine: FakeEngine, tenant: Tenant) -> None:
    assert (
        post(tenant, "/v1/chat/completions", BODIES["/v1/chat/completions"][1]).status_code == 200
    )
    assert engine.requests[-1]["tools"] == [TOOL]


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e400"])
def test_a_number_that_is_not_finite_is_refused_inside_a_schema(number: str) -> None:
    schema = f'{{"type": "object", "x": {{"y": [{number}]}}}}'
    for field in (
        f'"tools": [{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}]',
        f'"response_format": {schema}', f'"structured_outputs": {schema}',
    ):  # fmt: skip
        body = f'{{"model": "base", "messages": [{{"role": "user", "content": "x"}}], {field}}}'
        with pytest.raises(ValidationError, match="finite"):
            ChatBody.model_validate_json(body)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/keys", {"name": None, "role": None, "scopes": None, "limits": {"tokens_per_minute": None, "x": None}}),
        ("POST", "/v1/admin/tenants", {"name": "nulls", "limits": None, "x": None}),
        ("PATCH", "/v1/admin/tenants/nulls", {"limits": {"x": None}, "disabled": None, "x": None}),
        ("POST", "/v1/fine_tuning/jobs", {
            "model": "base", "training_file": "file-none", "validation_file": None, "suffix": None, "seed": None,
            "integrations": None, "x": None, "metadata": {"a": None}, "hyperparameters": None,
            "method": {"type": "supervised", "dpo": None, "supervised": {
                "hyperparameters": {"n_epochs": None, "batch_size": None, "x": None}, "x": None}},
        }),
        ("POST", "/v1/webhook_endpoints", {
            "name": "w", "url": "http://127.0.0.1:9/", "event_types": ["fine_tuning.job.failed"], "x": None}),
    ],
)  # fmt: skip
def test_null_is_not_given_in_other_bodies(
    tenant: Tenant, method: str, path: str, body: Any
) -> None:
    client = tenant.gateway.admin if "admin" in path else tenant.http
    answer = client.request(method, path, json=body)
    # No such file, and no webhook to a private address: what was found after the schema.
    assert "unknown field" not in answer.text
    assert answer.status_code in (200, 201) or answer.json()["error"]["code"] != "invalid_value", (
        answer.text
    )
    if "keys" in path:
        assert client.post(path, json={"x": 1}).status_code == 400


def test_the_marks_of_clients_are_taken_and_reach_no_engine(
    engine: FakeEngine, tenant: Tenant
) -> None:
    kinds: dict[str, list[tuple[str | int, ...]]] = {
        "request": [()], "message": [("messages", 0), ("messages", 2)], "content part": [("messages", 0, "content", 0)],
        "tool": [("tools", 0), ("tools", 0, "function")],
        "tool call": [("messages", 2, "tool_calls", 0), ("messages", 2, "tool_calls", 0, "function")],
    }  # fmt: skip
    check_marks(engine, tenant, "/v1/chat/completions", kinds)
    kinds = {
        "request": [()], "message": [("input", 1)], "input item": [("input", k) for k in (0, 1, 3, 4, 5, 6)],
        "reasoning item": [("input", 2)], "content part": [("input", 0, "content", 0), ("input", 4, "output", 0)],
        "tool": [("tools", 0)], "reasoning": [("reasoning",)], "text": [("text",)],
    }  # fmt: skip
    check_marks(engine, tenant, "/v1/responses", kinds)


def without_id(body: dict[str, Any]) -> dict[str, Any]:
    """What the engine got, without the id that each request has of its own."""
    return {name: value for name, value in body.items() if name != "request_id"}


def check_marks(engine: FakeEngine, tenant: Tenant, path: str, kinds: dict[str, Any]) -> None:
    body = BODIES[path][1]
    assert post(tenant, path, body).status_code == 200
    plain, sent = engine.requests[-1], copy.deepcopy(body)
    for kind, where in kinds.items():
        for place in where:
            at(sent, place).update(
                {name: {"type": "ephemeral", "url": URL} for name in IGNORED[kind]}
            )
    answer = post(tenant, path, sent)
    assert answer.status_code == 200, answer.text
    assert without_id(engine.requests[-1]) == without_id(plain)


def test_an_answer_can_be_sent_back_as_it_came(engine: FakeEngine, tenant: Tenant) -> None:
    said = tenant.openai.chat.completions.create(model="base", messages=HELLO).choices[0].message
    back = [
        *HELLO,
        said.model_dump() | {"tool_calls": []},
        {"role": "user", "content": "and then?"},
    ]
    tenant.openai.chat.completions.create(model="base", messages=back)
    assert engine.requests[-1]["messages"][1] == {"role": "assistant", "content": said.content}
    first = tenant.openai.responses.create(model="base", input="hello there")
    items: Any = [item.model_dump() for item in first.output]
    tenant.openai.responses.create(
        model="base", input=[*items, {"role": "user", "content": "and then?"}]
    )
    sent = engine.requests[-1]["input"]
    assert sent[0] == {"type": "message", "role": "assistant", "content": first.output_text}


URL = "http://127.0.0.1:1/secret"
REFERENCES: tuple[Any, ...] = (
    {"type": "image_url", "image_url": {"url": URL}}, {"type": "image_url", "image_url": URL}, {"image_url": URL},
    {"type": "input_image", "image_url": URL}, {"type": "input_file", "file_url": URL},
    {"type": "video_url", "video_url": URL},
    {"type": "input_audio", "input_audio": {"data": URL, "format": "wav"}}, {"type": "file", "file": {"file_data": URL}},
    {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot", "image_url": URL}},
    {"type": "image_generation_call", "id": "i", "result": URL}, {"type": "mcp", "server_label": "m", "server_url": URL},
    {"type": "item_reference", "id": URL}, {"type": "function_call_output", "call_id": "c", "output": [
        {"type": "input_image", "image_url": URL}]},
    {"images": [URL]}, {"audio": {"id": URL}}, {"prediction": {"type": "content", "content": [
        {"type": "image_url", "image_url": {"url": URL}}]}}, {"media_io_kwargs": {"image": {"url": URL}}},
    {"multi_modal_data": {"image": URL}}, {"mm_processor_kwargs": {"x": URL}}, {"prompt_embeds": URL},
    {"image": URL}, {"documents": [{"url": URL}]}, {"content": {"type": "image_url", "image_url": URL}},
)  # fmt: skip


@pytest.mark.parametrize("path", BODIES)
def test_no_reference_reaches_an_engine_from_any_place_of_a_body(path: str) -> None:
    kind, body = BODIES[path]
    refused = tried = 0
    for place in places(body):
        for reference in REFERENCES:
            for sent in placed(body, place, reference):
                tried += 1
                try:
                    given = kind.model_validate_json(json.dumps(sent))
                except ValidationError:
                    refused += 1
                    continue
                assert URL not in json.dumps(
                    given.model_dump(exclude_unset=True, exclude_none=True)
                ), sent
    assert refused > 0.8 * tried > 0


def placed(body: Any, place: tuple[str | int, ...], reference: Any) -> Iterator[Any]:
    """The body with a reference at a place: inside an object, instead of it, and in a list."""
    inside = copy.deepcopy(body)
    found = at(inside, place)
    if isinstance(found, list):
        found.append(copy.deepcopy(reference))
    else:
        found.update(copy.deepcopy(reference))
    yield inside
    if place and isinstance(reference, dict) and "type" in reference:
        for value in (reference, [reference]):
            instead = copy.deepcopy(body)
            at(instead, place[:-1])[place[-1]] = copy.deepcopy(value)
            yield instead


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file"])
def test_a_part_that_is_not_text_is_refused_by_its_type(tenant: Tenant, kind: str) -> None:
    parts: Any = [{"type": "text", "text": "x"}, {"type": kind, kind: {"url": URL}}]
    for role in ("user", "tool"):
        message: Any = {"role": role, "content": parts, "tool_call_id": "c"}
        with pytest.raises(
            openai.BadRequestError, match=f"type '{kind}' is not supported: only text"
        ):
            tenant.openai.chat.completions.create(model="base", messages=[message])
    with pytest.raises(openai.BadRequestError, match=f"type '{kind}' is not supported: only text"):
        tenant.openai.responses.create(model="base", input=[{"role": "user", "content": parts}])


def fields_of(typed: Any) -> set[str]:
    return set(get_type_hints(typed))


def literals(typed: Any) -> set[str]:
    """The values of its field `type`, under Required, Optional and the like."""

    def inside(hint: Any) -> set[str]:
        found = get_args(hint)
        return (
            set().union(*(({each} if isinstance(each, str) else inside(each)) for each in found))
            if found
            else set()
        )

    return inside(get_type_hints(typed)["type"])


@pytest.mark.parametrize(
    ("typed", "model"),
    [
        (completion_create_params.CompletionCreateParamsNonStreaming, CompletionBody),
        (chat.completion_create_params.CompletionCreateParamsNonStreaming, ChatBody),
        (responses.response_create_params.ResponseCreateParamsNonStreaming, ResponseBody),
        (embedding_create_params.EmbeddingCreateParams, EmbeddingBody),
        (chat.ChatCompletionStreamOptionsParam, inference._StreamOptions),
        (responses.response_create_params.StreamOptions, inference._StreamOptions),
        (chat.ChatCompletionDeveloperMessageParam, messages.ChatMessage),
        (chat.ChatCompletionSystemMessageParam, messages.ChatMessage),
        (chat.ChatCompletionUserMessageParam, messages.ChatMessage),
        (chat.ChatCompletionAssistantMessageParam, messages.ChatMessage),
        (chat.ChatCompletionToolMessageParam, messages.ChatMessage),
        (chat.ChatCompletionFunctionMessageParam, messages.ChatMessage),
        (chat.ChatCompletionContentPartTextParam, messages._ChatPart),
        (chat.ChatCompletionContentPartRefusalParam, messages._ChatPart),
        (chat.ChatCompletionMessageFunctionToolCallParam, messages._ToolCall),
        (chat.chat_completion_message_function_tool_call_param.Function, messages._Called),
        (chat.ChatCompletionFunctionToolParam, messages.ChatTool),
        (shared_params.FunctionDefinition, messages._Function),
        (chat.ChatCompletionNamedToolChoiceParam, messages.ChatToolChoice),
        (responses.EasyInputMessageParam, messages._MessageItem),
        (responses.ResponseOutputMessageParam, messages._MessageItem),
        (responses.ResponseFunctionToolCallParam, messages._CallItem),
        (response_input_item_param.FunctionCallOutput, messages._OutputItem),
        (responses.ResponseCustomToolCallParam, messages._CustomCallItem),
        (responses.ResponseCustomToolCallOutputParam, messages._OutputItem),
        (responses.ResponseReasoningItemParam, messages._ReasoningItem),
        (responses.ResponseInputTextParam, messages._InputPart),
        (responses.ResponseOutputTextParam, messages._InputPart),
        (responses.ResponseOutputRefusalParam, messages._InputPart),
        (responses.FunctionToolParam, messages.ResponseTool),
        (responses.CustomToolParam, messages.ResponseTool),
        (responses.ResponseTextConfigParam, inference._Text),
        (shared_params.Reasoning, inference._Reasoning),
    ],
)
def test_every_field_of_the_client_is_served_ignored_or_refused_with_a_reason(
    typed: Any, model: type[RequestModel]
) -> None:
    sent = fields_of(typed)
    assert sent
    assert sent <= set(model.model_fields) | set(model.ignored) | set(REFUSED)


def test_every_item_of_the_client_is_served_or_refused_by_its_type(tenant: Tenant) -> None:
    kinds = {
        kind
        for item in get_args(response_input_item_param.ResponseInputItemParam)
        for kind in literals(item)
    }
    assert len(kinds) > 20
    assert set(messages._ITEMS) <= kinds
    for kind in sorted(kinds - set(messages._ITEMS)):
        answer = post(
            tenant, "/v1/responses", {"model": "base", "input": [{"type": kind, "id": "x"}]}
        )
        assert answer.status_code == 400
        assert f"items of type '{kind}' are not supported" in answer.json()["error"]["message"]
