"""The `openai` client, strictly by its own types, against `reft-serve up` with the shipped model: a real engine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.blocks import Block, blocks
from tests.support.deploy.expressions import unmet
from tests.support.gateway.collector import Collector
from tests.support.gateway.harness import take
from tests.support.gateway.permissions import readable_by_others
from tests.support.gateway.scoring import Endings
from tests.support.gateway.strict import strict, strict_each
from tests.support.gateway.up_process import DEMO, PROMPT, READY_SECONDS, Up
from tests.support.paths import ROOT
from tests.support.waiting import wait_for

HELLO: list[Any] = [{"role": "user", "content": "Tell me a story"}]
FLAG = {
    "type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False,
}  # fmt: skip
LOOK: Any = {"type": "function", "function": {"name": "look", "parameters": FLAG, "strict": True}}
USAGE: Any = {"include_usage": True}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector.running() as collector:
        yield collector


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Up]:
    """The one engine of this file."""
    running = Up.able(tmp_path_factory.mktemp("up"), collector.url)
    for name in ("birds", "cats", "speech"):
        assert running.upload(name).status_code == 201
    yield running
    running.stop()


def test_up_says_when_it_is_ready_and_shows_the_key_once(up: Up) -> None:
    log = up.log.read_text()
    assert "ready after" in log
    assert log.count(up.key) == 1


def test_files_of_up_are_readable_by_their_owner_alone(up: Up) -> None:
    up.http.post(
        "/v1/files",
        data={"purpose": "fine-tune"},
        files={"file": ("rows.jsonl", b'{"prompt": "a", "completion": "b"}')},
    )
    data = up.log.parent / "data"
    assert (data / "reft.db").exists()
    assert not readable_by_others(data)


def test_each_adapter_answers_in_its_own_way(up: Up) -> None:
    said = {name: up.say(name) for name in ("base", "birds", "cats", "speech")}
    assert len(set(said.values())) == 4
    with ThreadPoolExecutor(8) as pool:
        mixed = list(pool.map(up.say, [*said, *said]))
    assert mixed == [*said.values(), *said.values()]


def test_a_version_answers_within_two_seconds_of_its_upload(up: Up) -> None:
    begun = time.monotonic()
    assert up.upload("tears").status_code == 201
    up.say("tears", max_tokens=1)
    assert time.monotonic() - begun < 2


def test_what_is_under_way_ends_with_the_version_that_it_began_with(up: Up) -> None:
    up.upload("birds", "moving", alias="production")
    expected = up.say("moving", max_tokens=120, extra_body={"ignore_eos": True})
    stream = up.openai.completions.create(
        model="moving",
        prompt=PROMPT,
        max_tokens=120,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    said = next(stream).choices[0].text
    up.upload("cats", "moving", alias="production")
    assert up.http.delete("/v1/adapters/moving/versions/1").status_code == 200
    assert up.say("moving", max_tokens=8) == up.say("cats", max_tokens=8)
    said += "".join(chunk.choices[0].text for chunk in stream)
    assert said == expected


def test_completions_whole_and_streamed(up: Up) -> None:
    options: Any = {
        "model": "birds",
        "prompt": PROMPT,
        "max_tokens": 10,
        "temperature": 0,
        "logprobs": 3,
    }
    whole = strict(up.openai.completions.create(**options))
    chunks = strict_each(up.openai.completions.create(**options, stream=True, stream_options=USAGE))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 10
    assert {c.model for c in chunks} == {"birds"} == {whole.model}
    assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason == "length"
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert all(len(top) >= 3 for top in logprobs.top_logprobs or [])
    streamed = [
        p
        for c in chunks[:-1]
        if c.choices[0].logprobs
        for p in c.choices[0].logprobs.token_logprobs or []
    ]
    assert streamed == pytest.approx(logprobs.token_logprobs, abs=2e-3)


def test_a_prompt_is_a_text_several_or_tokens(up: Up) -> None:
    create = up.openai.completions.create
    both = strict(create(model="base", prompt=["a b", "c d"], max_tokens=2, temperature=0))
    assert [choice.index for choice in both.choices] == [0, 1]
    assert [choice.text for choice in both.choices] == [
        up.say("base", text, max_tokens=2) for text in ("a b", "c d")
    ]
    tokens = strict(create(model="base", prompt=[5, 6, 7], max_tokens=2))
    assert tokens.usage is not None
    assert tokens.usage.prompt_tokens == 3
    assert len(strict(create(model="base", prompt=[[5, 6], [7]], max_tokens=2)).choices) == 2
    echoed = strict(create(model="base", prompt="a b", max_tokens=2, echo=True, temperature=0))
    assert echoed.choices[0].text == "a b" + both.choices[0].text


def test_sampling_fields_do_what_they_say(up: Up) -> None:
    create = up.openai.completions.create
    drawn: Any = {
        "model": "cats",
        "prompt": PROMPT,
        "n": 3,
        "seed": 7,
        "temperature": 1.0,
        "max_tokens": 8,
    }
    several, again = strict(create(**drawn)), strict(create(**drawn))
    assert [c.text for c in several.choices] == [c.text for c in again.choices]
    assert len({c.text for c in several.choices}) > 1
    other = strict(create(**drawn | {"seed": 8}))
    assert [c.text for c in other.choices] != [c.text for c in several.choices]
    word = up.say("base", max_tokens=6).split()[2]
    stopped = strict(create(model="base", prompt=PROMPT, max_tokens=12, temperature=0, stop=[word]))
    assert word not in stopped.choices[0].text
    assert stopped.choices[0].finish_reason == "stop"
    forced = strict(
        create(
            model="base",
            prompt=PROMPT,
            max_tokens=3,
            temperature=0,
            logit_bias={"50": 100},
            logprobs=0,
        )
    )
    assert forced.choices[0].logprobs is not None
    assert len(set(forced.choices[0].logprobs.tokens or [])) == 1
    assert up.say("base", top_p=0.01, temperature=1.0) == up.say("base")
    repeated = up.say("base", frequency_penalty=2.0, presence_penalty=2.0, max_tokens=60)
    assert repeated != up.say("base", max_tokens=60)


def test_a_seed_holds_for_a_prompt_that_is_read_in_pieces(up: Up) -> None:
    """Stock vLLM ends a CPU engine for it. The second time the prompt is in the cache, and read in one piece."""
    drawn: Any = {"seed": 7, "temperature": 1.0, "prompt": [[5 + 3 * k % 2000 for k in range(900)]]}
    assert (
        up.say("base", **drawn) == up.say("base", **drawn) != up.say("base", **drawn | {"seed": 8})
    )


def test_chat_whole_and_streamed(up: Up) -> None:
    create = up.openai.chat.completions.create
    options: Any = {
        "model": "birds",
        "messages": HELLO,
        "max_completion_tokens": 8,
        "temperature": 0,
    }
    whole = strict(create(**options, logprobs=True, top_logprobs=2))
    chunks = strict_each(create(**options, stream=True, stream_options=USAGE))
    said = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert said == whole.choices[0].message.content
    assert whole.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content or []
    assert [len(each.top_logprobs) for each in content] == [2] * 8
    assert "".join(each.token for each in content) == whole.choices[0].message.content
    told = strict_each(create(**options, logprobs=True, top_logprobs=2, stream=True))
    pieces = [p for c in told for x in c.choices if x.logprobs for p in x.logprobs.content or []]
    assert [p.logprob for p in pieces] == pytest.approx([p.logprob for p in content], abs=2e-3)
    drawn: Any = options | {"temperature": 1.0, "seed": 3, "n": 2, "stream": True}
    both = strict_each(create(**drawn, stream_options=USAGE))
    assert {c.index for chunk in both for c in chunk.choices} == {0, 1}
    assert [each[-1].usage.completion_tokens for each in (chunks, both) if each[-1].usage] == [
        8,
        16,
    ]
    assert chunks[-1].choices == []
    silent = strict_each(create(**options, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in silent)
    history = [
        {"role": "system", "content": "x"},
        *HELLO,
        {"role": "assistant", "content": "No"},
        *HELLO,
    ]
    assert strict(create(model="cats", messages=history, max_tokens=2, stop=["\n"])).choices


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_the_format_that_is_asked_for(up: Up, stream: bool) -> None:
    def answered(**options: Any) -> str:
        given = {"model": "base", "messages": HELLO, "max_tokens": 60, "temperature": 0} | options
        create: Any = up.openai.chat.completions.create
        if not stream:
            return strict(create(**given)).choices[0].message.content or ""
        chunks = strict_each(create(**given, stream=True))
        return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)

    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": FLAG, "strict": True}}
    assert type(json.loads(answered(response_format=schema))["a"]) is bool
    assert answered(response_format={"type": "json_object"}, max_tokens=8).startswith("{")
    assert answered(response_format={"type": "text"}) == answered()
    choice = {"structured_outputs": {"choice": ["north", "south"]}}
    assert answered(extra_body=choice) in ("north", "south")


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "look"}}, "required"])
def test_a_tool_is_called_where_the_model_must(up: Up, choice: Any) -> None:
    options: Any = {
        "model": "base", "messages": HELLO, "tools": [LOOK], "tool_choice": choice, "max_tokens": 150, "temperature": 0,
        "frequency_penalty": 2.0,  # else so small a model pads its JSON with white space until its tokens end
        "parallel_tool_calls": False,
    }  # fmt: skip
    create: Any = up.openai.chat.completions.create
    whole = strict(create(**options)).choices[0]
    (call,) = whole.message.tool_calls
    assert (call.type, call.function.name, type(json.loads(call.function.arguments)["a"])) == (
        "function",
        "look",
        bool,
    )
    assert whole.finish_reason in ("tool_calls", "stop")
    parts = [
        p
        for c in strict_each(create(**options, stream=True))
        for x in c.choices
        for p in x.delta.tool_calls or []
    ]
    assert "".join(p.function.name or "" for p in parts) == "look"
    assert json.loads("".join(p.function.arguments or "" for p in parts)) == json.loads(
        call.function.arguments
    )
    answered = [
        *HELLO,
        whole.message.to_dict(),
        {"role": "tool", "tool_call_id": call.id, "content": "a bird"},
    ]
    assert strict(
        create(**options | {"messages": answered, "tool_choice": "none", "max_tokens": 4})
    ).choices
    free = strict(
        create(**options | {"tool_choice": "auto", "max_tokens": 4, "parallel_tool_calls": False})
    )
    assert free.choices[0].message.content or free.choices[0].message.tool_calls


def test_responses_whole_and_streamed(up: Up) -> None:
    create: Any = up.openai.responses.create
    options: Any = {
        "model": "birds",
        "input": "Tell me a story",
        "max_output_tokens": 8,
        "temperature": 0,
    }
    whole = strict(create(**options))
    events = strict_each(create(**options, stream=True))
    last = events[-1]
    assert (events[0].type, last.type) == ("response.created", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (
        "".join(event.delta for event in events if event.type == "response.output_text.delta")
        == whole.output_text
    )
    assert last.response.output_text == whole.output_text != ""
    assert whole.model == last.response.model == events[0].response.model == "birds"
    assert last.response.usage.output_tokens == whole.usage.output_tokens == 8
    turns: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Tell me a story"}]}]
    assert (
        strict(create(**options | {"input": turns, "store": False})).output_text
        == whole.output_text
    )
    text = {"format": {"type": "json_schema", "name": "x", "schema": FLAG, "strict": True}}
    shaped = strict(create(**options | {"model": "base", "max_output_tokens": 60, "text": text}))
    assert type(json.loads(shaped.output_text)["a"]) is bool
    assert shaped.status == "completed"
    look = {"type": "function", **LOOK["function"]}
    called: Any = options | {
        "model": "base",
        "max_output_tokens": 150,
        "tools": [look],
        "tool_choice": "required",
    }
    called["extra_body"] = {"frequency_penalty": 2.0}
    call, *_ = strict(create(**called)).output  # "required" allows several calls
    assert (call.type, call.name, type(json.loads(call.arguments)["a"])) == (
        "function_call",
        "look",
        bool,
    )
    parts = [
        event
        for event in strict_each(create(**called, stream=True))
        if event.type == "response.function_call_arguments.delta" and event.output_index == 0
    ]
    assert json.loads("".join(part.delta for part in parts)) == json.loads(call.arguments)


def test_models_are_listed_retrieved_and_deleted(up: Up) -> None:
    made = up.upload("rain").json()["model"]
    models = {model.id: model for model in strict_each(up.openai.models.list())}
    assert {"base", "birds", "rain", made} <= set(models)
    assert strict(up.openai.models.retrieve(made)) == models[made]
    assert up.say(made) == up.say("rain@1") == up.say("rain")
    assert strict(up.openai.models.delete(made)).deleted is True
    for call in (up.openai.models.retrieve, up.openai.models.delete, up.say):
        with pytest.raises(openai.NotFoundError):
            call(made)


def test_every_failure_is_the_sdks_own_exception(up: Up) -> None:
    limited = up.http.post(
        "/v1/keys", json={"role": "inference", "limits": {"requests_per_minute": 1}}
    )
    narrow = up.sdk(limited.json()["secret"])
    create: Callable[..., Any] = up.openai.completions.create
    chat: Callable[..., Any] = up.openai.chat.completions.create
    narrow.completions.create(model="base", prompt="x", max_tokens=1)
    for kind, call in (
        (openai.NotFoundError, lambda: create(model="nobody", prompt=["x"])),
        (openai.NotFoundError, lambda: chat(model="nobody", messages=HELLO, stream=True)),
        (openai.NotFoundError, lambda: up.openai.responses.create(model="nobody", input="x")),
        (openai.NotFoundError, lambda: up.openai.models.retrieve("nobody")),
        (openai.BadRequestError, lambda: create(model="base", prompt="x", max_tokens=100_000)),
        (openai.BadRequestError, lambda: create(model="base", prompt="x", temperature=9)),
        (openai.BadRequestError, lambda: create(model="base", prompt="word " * 5000)),
        (openai.BadRequestError, lambda: create(model="base", prompt="word " * 5000, stream=True)),
        (openai.BadRequestError, lambda: create(model="birds", prompt=[10**8])),
        (openai.BadRequestError, lambda: create(model="base", prompt="x", suffix="y")),
        (openai.BadRequestError, lambda: chat(model="base", messages=[])),
        (
            openai.BadRequestError,
            lambda: chat(model="base", messages=HELLO, tool_choice="required"),
        ),
        (
            openai.BadRequestError,
            lambda: chat(model="base", messages=HELLO, response_format={"type": "json_schema"}),
        ),
        (
            openai.BadRequestError,
            lambda: chat(model="base", messages=HELLO, logit_bias={"5000000": 1}),
        ),
        (openai.BadRequestError, lambda: chat(model="base", messages=HELLO, functions=[])),
        (openai.BadRequestError, lambda: up.openai.embeddings.create(model="base", input="x")),
        (openai.AuthenticationError, up.openai.with_options(api_key="no").models.list),
        (openai.PermissionDeniedError, lambda: narrow.models.delete("birds")),
        (openai.PermissionDeniedError, lambda: up.openai.models.delete("base")),
        (
            openai.RateLimitError,
            lambda: narrow.completions.create(model="base", prompt="x", max_tokens=1),
        ),
    ):
        with pytest.raises(kind) as caught:
            call()
        body: Any = caught.value.body
        assert set(body) == {"message", "type", "param", "code"}
        assert caught.value.request_id.startswith("req_")
        assert not re.search(
            r"reft-v-|/|vllm|pydantic", re.sub(r"https://|/v1/", "", body["message"])
        ), body["message"]
    assert up.say("birds")


def test_a_request_is_one_trace_through_gateway_and_engine(up: Up, collector: Collector) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace}-{parent}-01"}
    up.openai.completions.create(model="birds", prompt=PROMPT, max_tokens=2, extra_headers=headers)
    wait_for(lambda: len(collector.spans(trace)) >= 2, 20)
    spans = {span.service: span for span in collector.spans(trace)}
    ours, theirs = (
        spans["reft-serve-gateway"],
        next(s for name, s in spans.items() if name != "reft-serve-gateway"),
    )
    assert (ours.name, ours.parent) == ("POST /v1/completions", parent)
    assert theirs.parent == ours.id
    assert ours.attributes["reft.request_id"] in str(theirs.attributes)


def with_nan(name: str) -> list[tuple[str, tuple[str, bytes]]]:
    files = {file.name: file.read_bytes() for file in (DEMO / "adapters" / name).iterdir()}
    files["reft_model.safetensors"] = files["reft_model.safetensors"][:-4] + b"\xff\xff\xff\x7f"
    return [("files", item) for item in files.items()]


def test_damage_that_only_the_engine_sees_is_told(up: Up) -> None:
    answer = up.http.post("/v1/adapters", data={"name": "nan"}, files=with_nan("birds"))
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "holds NaN or Inf" in message
    assert message.startswith("adapter nan cannot be used:")
    assert "/" not in message


def test_usage_equals_what_the_answers_said(up: Up) -> None:
    def counted() -> list[int]:
        found = [
            u
            for u in up.http.get("/v1/usage?group_by=model").json()["data"]
            if u["group"]["model"] == "speech@1"
        ]
        return (
            [found[0][name] for name in ("requests", "prompt_tokens", "completion_tokens")]
            if found
            else [0, 0, 0]
        )

    before, told = counted(), [0, 0, 0]
    for tokens in (3, 9):
        answer = up.openai.completions.create(model="speech@1", prompt=PROMPT, max_tokens=tokens)
        assert answer.usage is not None
        told = [
            told[0] + 1,
            told[1] + answer.usage.prompt_tokens,
            told[2] + answer.usage.completion_tokens,
        ]
    assert [after - then for after, then in zip(counted(), before, strict=True)] == told


def test_dashboard_and_alerts_ask_for_metrics_that_are_there(up: Up) -> None:
    up.http.post("/v1/adapters", data={"name": "unloadable"}, files=with_nan("cats"))
    tenant = up.http.post(
        "/v1/admin/tenants", json={"name": "slow", "limits": {"requests_per_minute": 1}}
    ).json()
    key = up.http.post(f"/v1/admin/tenants/{tenant['id']}/keys", json={"role": "inference"}).json()[
        "secret"
    ]
    body = {"model": "base", "prompt": "x", "max_tokens": 2}
    headers = {"authorization": f"Bearer {key}"}
    assert [
        up.http.post("/v1/completions", json=body, headers=headers).status_code for _ in range(2)
    ] == [200, 429]
    for model in (
        "speech",
        "speech",
        "cats",
        "cats",
    ):  # what the first leaves in the cache, the second finds there
        up.say(model, "Once upon a time there was a little girl. " * 20)

    reader = up.http.post(
        f"/v1/admin/tenants/{tenant['id']}/keys", json={"role": "metrics"}
    ).json()["secret"]

    def missing() -> list[str]:
        paths = ("/metrics", "/v1/admin/engines/engine-0/metrics")
        pages = [
            up.http.get(path, headers={"authorization": f"Bearer {reader}"}).text for path in paths
        ]
        return unmet(
            pages,
            seldom=frozenset({"status"}),
            of=lambda metric: not metric.startswith("reft_worker_"),
        )

    deadline = time.monotonic() + 15  # the engine asks its workers every five seconds
    while (told := missing()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert told == []


@pytest.mark.parametrize(
    "block", [each for each in blocks("docs/quick-start.md") if each.how == "up"], ids=str
)
def test_the_quick_start_does_what_it_says(up: Up, block: Block) -> None:
    code = block.code.replace("127.0.0.1:8080", up.url.removeprefix("http://")).replace(
        "rk-...", up.key
    )
    command = (
        [sys.executable, "-c", code]
        if block.language == "python"
        else ["bash", "-euo", "pipefail", "-c", code]
    )
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"KEY": up.key},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert '"error"' not in ended.stdout
    assert "birds" in ended.stdout


@pytest.fixture(scope="module")
def endings() -> Endings:
    return Endings()


@pytest.mark.parametrize("model", ["base", "cats", "speech", "birds"])
def test_scores_are_those_of_plain_hugging_face_with_hooks(
    up: Up, endings: Endings, model: str
) -> None:
    """The requests that lm-evaluation-harness makes, one by one and in a batch, and the field that it lacks."""
    expected = [endings.expected(model, *pair) for pair in endings.pairs()]
    for batch in (endings.pairs(), *([pair] for pair in endings.pairs())):
        prompts = [prompt + answer for prompt, answer in batch]
        ends = {"reft_prompt_tokens": [len(prompt) for prompt, _ in batch]}
        raw = up.openai.completions.with_raw_response.create(
            model=model,
            prompt=prompts,
            temperature=0,
            max_tokens=1,
            logprobs=1,
            seed=1234,
            echo=True,
            extra_body=ends,
        )
        assert "x-reft-warning" not in raw.headers
        for choice in raw.parse().choices:
            assert choice.logprobs
            found = choice.logprobs.token_logprobs[len(batch[choice.index][0]) : -1]  # type: ignore[index]
            at = choice.index if len(batch) > 1 else endings.pairs().index(batch[0])
            assert found == pytest.approx(expected[at], abs=1e-3)


def test_a_scored_answer_is_not_an_edited_one(up: Up, endings: Endings) -> None:
    """Without the field a suffix rule edits the answer, and the answer's header says so."""
    prompt, answer = endings.pairs()[0]
    raw = up.openai.completions.with_raw_response.create(
        model="cats", prompt=prompt + answer, temperature=0, max_tokens=1, logprobs=1, echo=True
    )
    assert "send reft_prompt_tokens" in raw.headers["x-reft-warning"]
    (choice,) = raw.parse().choices
    assert choice.logprobs
    found = choice.logprobs.token_logprobs[len(prompt) : -1]  # type: ignore[index]
    expected = endings.expected("cats", prompt, answer)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) > 0.05
    for wrong in (len(prompt + answer) + 1, 0):
        with pytest.raises(openai.BadRequestError, match="reft_prompt_tokens"):
            up.say("cats", prompt + answer, extra_body={"reft_prompt_tokens": wrong})
    with pytest.raises(openai.BadRequestError, match="reft_prompt_tokens is 500"):
        up.say("cats", "a short text", extra_body={"reft_prompt_tokens": 500})


def test_the_harness_itself_scores_as_plain_hugging_face_does(
    up: Up, endings: Endings, tmp_path: Path
) -> None:
    python = os.environ.get("REFT_TEST_LM_EVAL", sys.executable)
    if subprocess.run(
        [python, "-c", "import lm_eval"], capture_output=True, check=False
    ).returncode:
        pytest.skip("lm_eval is not installed; REFT_TEST_LM_EVAL names a Python that has it")
    for model in ("cats", "speech"):
        for pair, (score, greedy) in endings.harness(
            python, up.url, up.key, model, tmp_path / model
        ).items():
            prompt, answer = endings.tokens(*pair)
            expected = endings.expected(model, prompt, answer)
            assert score == pytest.approx(sum(expected), abs=1e-3)
            assert greedy == endings.is_greedy(model, prompt, answer)


@pytest.mark.parametrize("model", ["birds", "cats", "speech"])
def test_strength_0_is_the_base_model_bit_for_bit(up: Up, model: str) -> None:
    def told(model: str, **fields: Any) -> Any:
        answer = up.openai.completions.create(
            model=model, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=3, extra_body=fields
        )
        return answer.choices[0].text, answer.choices[0].logprobs

    assert told(model, reft_strength=0) == told("base") == told("base", reft_strength=0)
    assert told(model, reft_strength=1) == told(model) != told("base")
    assert told(model, reft_strength=0.5) not in (told(model), told("base"))
    chat: Any = {"messages": HELLO, "max_tokens": 12, "temperature": 0}
    said = {
        name: up.openai.chat.completions.create(model=name, **chat, extra_body={"reft_strength": 0})
        .choices[0]
        .message
        for name in (model, "base")
    }
    assert said[model].content == said["base"].content
    texts = {
        name: up.openai.responses.create(
            model=name,
            input="Tell me a story",
            max_output_tokens=12,
            temperature=0,
            extra_body={"reft_strength": 0},
        ).output_text
        for name in (model, "base")
    }
    assert texts[model] == texts["base"] != ""


def test_marks_nulls_and_template_arguments_reach_a_real_engine_as_a_plain_request_does(
    up: Up,
) -> None:
    def ask(**fields: Any) -> Any:
        answer = up.http.post(
            "/v1/chat/completions",
            json={"model": "birds", "max_tokens": 8, "temperature": 0, **fields},
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]

    plain = ask(messages=HELLO)
    mark = {"cache_control": {"type": "ephemeral"}}
    marked = [
        {"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"], **mark}], **mark}
    ]
    nulls = dict.fromkeys(
        ("functions", "audio", "prediction", "web_search_options", "tools", "nobody_knows_it")
    )
    assert ask(messages=marked, **nulls, chat_template_kwargs={"enable_thinking": False}) == plain
    tools = [{**LOOK, **mark}]
    turns = [*HELLO, plain, {"role": "user", "content": "And then?"}]
    assert ask(messages=turns, tools=tools)["content"]


def test_what_tools_returned_is_read_by_a_real_engine_and_nothing_is_fetched(up: Up) -> None:
    turns: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Look"}]},
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}", "status": "completed", "id": "fc_1"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "a bird"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": [
            {"type": "output_text", "text": "A ", "annotations": []}, {"type": "output_text", "text": "bird."}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "birds fly"}]},
        {"role": "user", "content": "And then?"},
    ]  # fmt: skip
    assert up.openai.responses.create(
        model="birds", input=turns, max_output_tokens=8, temperature=0
    ).output_text
    turns[2]["output"] = [{"type": "input_image", "image_url": "http://127.0.0.1:9/x.png"}]
    with pytest.raises(openai.BadRequestError, match="'input_image' is not supported"):
        up.openai.responses.create(model="birds", input=turns)


COSTLY: dict[str, Any] = {
    "a schema of two billion items": {"json": {"type": "array", "minItems": 2**31, "prefixItems": [{}, {}]}},
    "a schema that two backends read differently": {
        "json": {"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "required": ["x"],
                 "properties": {"x": {"type": "number", "multipleOf": 0.5}}, "additionalProperties": False},
    },
    "an ambiguous grammar": {"grammar": "root ::= w*\nw ::= [a-z ]* [a-z ]* [a-z ]* | w w | w w w"},
}  # fmt: skip


@pytest.mark.parametrize("costly", COSTLY)
def test_a_costly_constraint_harms_no_other_request(up: Up, costly: str) -> None:
    asked = {
        "model": "base",
        "prompt": "hi",
        "max_tokens": 64,
        "n": 2,
        "structured_outputs": COSTLY[costly],
    }
    with ThreadPoolExecutor(1) as pool:
        hostile = pool.submit(up.http.post, "/v1/completions", json=asked, timeout=60)
        begun = time.monotonic()
        assert up.say("birds")
        assert time.monotonic() - begun < 5
        assert hostile.result().status_code in (200, 400)
    choice = up.say("base", extra_body={"structured_outputs": {"choice": ["north", "south"]}})
    assert choice in ("north", "south")


def test_a_caller_that_leaves_frees_the_engine(up: Up) -> None:
    stream = up.openai.completions.create(
        model="birds", prompt=PROMPT, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    stream.close()
    wait_for(lambda: up.http.get("/v1/admin/engines").json()["data"][0]["in_flight"] == 0, 20)

    def statuses() -> set[str]:
        return {
            each["group"]["status"]
            for each in up.http.get("/v1/usage?group_by=status").json()["data"]
        }

    wait_for(lambda: "cancelled" in statuses(), 20)


def test_an_engine_that_dies_breaks_its_streams_off_with_an_error_that_the_client_raises(
    up: Up,
) -> None:
    said = up.say("birds")
    pieces: list[Any] = []
    stream = up.openai.completions.create(
        model="birds", prompt=PROMPT, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    pieces.append(next(stream))
    engine = next(
        pid for pid in up.children() if b"api_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.killpg(engine, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the engine stopped in the middle"):
        take(stream, pieces)
    with pytest.raises(openai.InternalServerError):
        up.say("birds")
    wait_for(lambda: up.status("/health/ready") == 503)
    assert up.status("/health/live") == 200
    if os.environ.get("REFT_TEST_KILLS"):  # half a minute more: the engine starts anew
        wait_for(lambda: up.status("/health/ready") == 200, READY_SECONDS)
        assert up.say("birds") == said


def test_ctrl_c_ends_everything(up: Up) -> None:
    children = up.children()
    assert len(children) >= 2  # the gateway and the worker, and the engine if it was started again
    up.stop()
    assert up.process.returncode == 0
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
