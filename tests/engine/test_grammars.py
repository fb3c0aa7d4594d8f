"""Structured outputs: compiled in children with limits, matched within bounds, the same for all whoever asks first."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llguidance
import pytest
import torch
from vllm.exceptions import QueueOverflowError, VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_guidance import GuidanceBackend

from reft_serve import demo
from reft_serve.engine.core.grammars import EXCEEDED, BoundedGrammar, end_costly
from reft_serve.engine.front_end import grammar_checks
from reft_serve.engine.front_end.grammar_checks import GrammarChecks
from reft_serve.engine.grammar_compiler.process import (
    AT_ONCE,
    LIMITS,
    WAITING_PER_CALLER,
    schema_options,
    serialise,
)
from reft_serve.engine.plugin import register
from tests.support.waiting import wait_for

TOKENIZER = (Path(demo.__file__).parent / "model" / "tokenizer.json").read_text()
AMBIGUOUS = "root ::= w*\nw ::= [a-z ]* [a-z ]* [a-z ]* | w w | w w w"


@pytest.fixture(scope="module")
def checks() -> GrammarChecks:
    return GrammarChecks(
        {"tokenizer": TOKENIZER, "n_vocab": 2048, "eos": 0}, {"whitespace_flexible": True}
    )


def verdict(checks: GrammarChecks, caller: str = "", **constraint: Any) -> Any:
    return checks.submit(StructuredOutputsParams(**constraint), caller).result(30)


def children(checks: GrammarChecks) -> list[int]:
    assert checks._process is not None
    return [
        int(pid)
        for pid in Path(f"/proc/{checks._process.pid}/task/{checks._process.pid}/children")
        .read_text()
        .split()
    ]


@pytest.mark.parametrize(
    "constraint",
    [
        {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}},
        {"json": {"type": "number", "multipleOf": 0.5, "minimum": 1, "maximum": 9}},
        {"json": {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}},
        {"json": {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}},
        {"json": {"type": "array", "minItems": 4096, "prefixItems": [{}, {}]}},
        {"json_object": True},
        {"regex": "(([a-z ]*)*[a-z ]*)*"},
        {"regex": "[a-z]{1,100000}"},
        {"choice": [f"choice number {i}" for i in range(2_048)]},
        {"grammar": 'root ::= "a" root | "b"'},
        {"grammar": "start: /[a-z]+/"},
        {"structural_tag": json.dumps({"triggers": ["<f"], "structures": [{"begin": "<f=a>", "schema": {}, "end": "</f>"}]})},
    ],
)  # fmt: skip
def test_what_can_be_bounded_is_served(checks: GrammarChecks, constraint: dict[str, Any]) -> None:
    found = verdict(checks, **constraint)
    assert not found.fault
    assert not llguidance.LLMatcher.validate_grammar(found.grammar, limits=LIMITS)


@pytest.mark.parametrize(
    ("constraint", "sentence"),
    [
        ({"grammar": AMBIGUOUS}, "Too many items"),
        ({"grammar": "root ::= missing"}, "Rule 'missing' not found"),
        ({"grammar": "\x00 no grammar"}, "grammar"),
        ({"regex": "("}, "invalid regex"),
        ({"regex": "([a-z]{1,300}){1,300}"}, "too many expressions"),
        ({"json": {"type": "nonsense"}}, "Invalid type"),
        ({"json": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}}, "integer range"),
        ({"json": {"$ref": "#"}}, "json cannot be used"),
        (
            {"json": {"properties": {"x": {}}, "patternProperties": {"^n_": {}}}},
            "`patternProperties` together with `properties`",
        ),
        ({"json": {"$ref": "http://127.0.0.1:9/schema"}}, "json cannot be used"),
        ({"structural_tag": "{}"}, "`triggers` and `structures` only"),
        (
            {"structural_tag": json.dumps({"triggers": [], "structures": [{"begin": "a"}]})},
            "no trigger begins",
        ),
    ],
)
def test_what_is_unsound_or_too_costly_is_refused_by_name(
    checks: GrammarChecks, constraint: dict[str, Any], sentence: str
) -> None:
    began = time.monotonic()
    assert sentence in verdict(checks, **constraint).fault
    assert time.monotonic() - began < 10


def test_what_is_too_large_does_not_reach_a_child(checks: GrammarChecks) -> None:
    with pytest.raises(VLLMValidationError, match="minItems over 4,096"):
        verdict(checks, json={"type": "array", "minItems": 2**31, "prefixItems": [{}, {}]})


@pytest.mark.parametrize("attack", ["memory", "time"])
def test_a_child_that_takes_too_much_ends_alone(
    monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    monkeypatch.setattr(
        grammar_checks, "check_constraint", lambda *_: None
    )  # the next line of defence
    checks = GrammarChecks(
        {"tokenizer": TOKENIZER, "n_vocab": 2048, "eos": 0}, {"whitespace_flexible": True}
    )
    many: dict[str, dict[str, Any]] = {
        "memory": {"json": {"type": "array", "minItems": 2**31, "prefixItems": [{}, {}]}},
        "time": {"choice": [f"{i:09d}" * 40 for i in range(60_000)]},
    }
    assert "json" in verdict(checks, **many["memory"]).fault or attack == "time"
    found = verdict(checks, **many[attack])
    assert "too costly" in found.fault or "cannot be used" in found.fault
    assert not verdict(checks, choice=["yes", "no"]).fault
    wait_for(lambda: not children(checks))


def test_verdicts_are_remembered_and_shared(checks: GrammarChecks) -> None:
    first = checks.submit(StructuredOutputsParams(regex="[x-z]{5}"), "one")
    second = checks.submit(StructuredOutputsParams(regex="[x-z]{5}"), "two")
    assert first.result(30) is second.result(30)
    assert checks.submit(StructuredOutputsParams(regex="[x-z]{5}"), "three").done()
    checks.condemn(StructuredOutputsParams(regex="[x-z]{5}"))
    assert "too costly to match" in verdict(checks, regex="[x-z]{5}").fault


class Held(GrammarChecks):
    """Checks whose children are replaced by the test."""

    def __init__(self) -> None:
        super().__init__({"tokenizer": "byte", "n_vocab": None, "eos": None}, {})
        self.begun: list[str] = []
        self.go: Future[None] = Future()

    def _judge(self, job: Any) -> Any:
        self.begun.append(job.caller)
        self.go.result(30)
        return super()._judge(job)


def test_callers_take_turns_and_wait_in_bounded_queues() -> None:
    checks = Held()
    for index in range(AT_ONCE):
        checks.submit(StructuredOutputsParams(regex=f"held{index}"), "many")
    wait_for(lambda: len(checks.begun) == AT_ONCE)
    for index in range(WAITING_PER_CALLER):
        checks.submit(StructuredOutputsParams(regex=f"many{index}"), "many")
    with pytest.raises(QueueOverflowError):
        checks.submit(StructuredOutputsParams(regex="one too many"), "many")
    other = checks.submit(StructuredOutputsParams(regex="other"), "other")
    checks.go.set_result(None)
    assert not other.result(30).fault
    assert checks.begun.index("other") <= 2 * AT_ONCE + 1


def test_work_for_a_caller_that_left_ends(checks: GrammarChecks) -> None:
    async def leave() -> None:
        future = checks.submit(StructuredOutputsParams(regex="(a|b)" * 1_000), "leaver")
        waiting = asyncio.wrap_future(future)
        await asyncio.sleep(0.02)
        waiting.cancel()

    asyncio.run(leave())
    wait_for(lambda: not children(checks) and not checks._jobs)
    assert not verdict(checks, regex="after[0-9]").fault


def test_the_process_is_started_again_and_ends_with_its_owner() -> None:
    checks = GrammarChecks({"tokenizer": "byte", "n_vocab": None, "eos": None}, {})
    assert not verdict(checks, regex="a").fault
    assert checks._process is not None
    first = checks._process
    first.kill()
    first.wait()
    assert not verdict(checks, regex="b").fault
    second = checks._process
    assert second.pid != first.pid
    del checks
    gc.collect()
    assert second.wait(10) == 0
    assert not os.path.exists(f"/proc/{second.pid}")


@pytest.fixture(scope="module")
def config() -> Any:
    from vllm.engine.arg_utils import EngineArgs

    register()
    model = str(Path(demo.__file__).parent / "model")
    return EngineArgs(
        model=model, enable_lora=True, max_model_len=64, dtype="float32"
    ).create_engine_config()


@pytest.fixture(scope="module")
def processor(config: Any) -> Any:
    from vllm.v1.engine.input_processor import InputProcessor

    return InputProcessor(config)


def processed(processor: Any, **constraint: Any) -> Any:
    params = SamplingParams(max_tokens=8, structured_outputs=StructuredOutputsParams(**constraint))
    prompt = {"type": "token", "prompt_token_ids": [5, 6, 7], "cache_salt": "tenant"}
    return processor.process_inputs("x", prompt, params, supported_tasks=("generate",))


def test_a_front_end_sends_on_only_what_was_compiled(processor: Any) -> None:
    sent = processed(
        processor, json={"type": "integer", "minimum": 3}
    ).sampling_params.structured_outputs
    assert sent.json is None
    assert sent._backend == "guidance"
    assert "minimum" in sent.grammar
    for constraint in (
        {"grammar": "root ::= missing"},
        {"grammar": AMBIGUOUS},
        {"choice": ["x" * 9_000]},
    ):
        with pytest.raises(VLLMValidationError):
            processed(processor, **constraint)
    with pytest.raises(VLLMValidationError, match="json_object must be True"):
        processed(processor, json_object=False)


# What vLLM's own choice of a backend would give to outlines and to xgrammar.
FIRST = [
    {"json": {"type": "object", "patternProperties": {"^n_": {"type": "number", "multipleOf": 0.5}}}},
    {"choice": ["yes", "no"]},
    {"regex": "[a-d]{4}"},
]  # fmt: skip


@pytest.mark.parametrize("first", FIRST)
def test_whatever_the_first_request_is_all_have_one_backend(
    config: Any, processor: Any, first: dict[str, Any]
) -> None:
    manager = StructuredOutputManager(config)
    backend = manager.backend
    assert type(backend) is GuidanceBackend
    for constraint in (first, {"choice": ["yes", "no"]}):
        request = Request.from_engine_core_request(processed(processor, **constraint), None)
        manager.grammar_init(request)
        assert request.structured_output_request is not None
        wait_for(lambda held=request.structured_output_request: held.is_grammar_ready)
        assert type(request.structured_output_request.grammar) is BoundedGrammar
    assert manager.backend is backend
    request.status = RequestStatus.RUNNING
    mask = manager.grammar_bitmask({request.request_id: request}, [request.request_id], {})
    assert mask is not None
    assert 0 < sum(bin(word & 0xFFFFFFFF).count("1") for word in mask[0].tolist()) < 20
    no = manager.tokenizer.encode("no", add_special_tokens=False)
    assert manager.accept_tokens(request, no)
    request.structured_output_request.grammar.end()
    assert not manager.accept_tokens(request, no)
    assert request.stop_reason == EXCEEDED
    manager.clear_backend()


def test_a_bound_that_is_exceeded_while_matching_is_the_callers_error(processor: Any) -> None:
    ended = SimpleNamespace(
        outputs=[SimpleNamespace(stop_reason=None), SimpleNamespace(stop_reason=EXCEEDED)]
    )

    async def original(*_: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(outputs=[SimpleNamespace(stop_reason=None)])
        yield ended

    generate = grammar_checks.wrap_generate(original)
    front = SimpleNamespace(input_processor=processor)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="[0-9]{7}"))

    async def collect() -> list[Any]:
        return [answer async for answer in generate(front, {"cache_salt": "t"}, params, "x")]

    with pytest.raises(VLLMValidationError, match="too costly to match"):
        asyncio.run(collect())
    with pytest.raises(VLLMValidationError, match="too costly to match"):  # from now on, at once
        processed(processor, regex="[0-9]{7}")


def test_a_forced_tool_call_follows_the_schema_of_its_tool(processor: Any) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser import ParserManager

    parameters = {
        "type": "object",
        "properties": {"grams": {"type": "integer"}},
        "required": ["grams"],
    }
    tool = {"type": "function", "function": {"name": "weigh", "parameters": parameters}}
    for choice in ("required", {"type": "function", "function": {"name": "weigh"}}):
        asked = {
            "model": "m",
            "messages": [{"role": "user", "content": "x"}],
            "tools": [tool],
            "tool_choice": choice,
        }
        request = ChatCompletionRequest.model_validate(asked)
        parser = ParserManager.get_parser(
            tool_parser_name="hermes", enable_auto_tools=True, tokenizer=processor.tokenizer
        )
        adjusted = parser(processor.tokenizer, request.tools).adjust_request(request)
        assert adjusted.structured_outputs.structural_tag is None
        assert '"grams"' in json.dumps(adjusted.structured_outputs.json)


@pytest.mark.parametrize(
    ("white_space", "text", "sound"),
    [
        (True, '{"x": [1, 2]}', True),
        (True, '{"x":[1,2]}', True),
        (True, '{"x":  []}', False),
        (True, '{"x"\n: []}', False),
        (True, '{\n"x": []}', False),
        (False, '{"x":[1,2]}', True),
        (False, '{"x": [1]}', False),
    ],
)
def test_json_cannot_be_padded_with_white_space(white_space: bool, text: str, sound: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"x": {"type": "array", "items": {"type": "number"}}},
        "required": ["x"],
    }
    tokenizer = llguidance.LLTokenizer("byte")
    grammar = serialise("json", json.dumps(schema), schema_options(white_space=white_space))
    matcher = llguidance.LLMatcher(tokenizer, grammar, limits=LIMITS, log_level=0)
    assert (matcher.try_consume_tokens(tokenizer.tokenize_str(text)) == len(text)) is sound


NAMED = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "text", "sound"),
    [
        (NAMED, '{"a": 1}', True),
        (NAMED, '{"a": 1, "b": 2}', False),
        (NAMED | {"additionalProperties": True}, '{"a": 1, "b": 2}', True),
        ({"type": "array", "items": NAMED}, '[{"b": 2}]', False),
        ({"$ref": "#/$defs/n", "$defs": {"n": NAMED}}, '{"b": 2}', False),
        ({"anyOf": [NAMED, {"type": "null"}]}, '{"b": 2}', False),
        ({"type": "object"}, '{"b": 2}', True),
        ({"allOf": [NAMED, {"properties": {"b": {"type": "integer"}}, "required": ["b"]}]}, '{"a": 1, "b": 2}', True),
        ({"properties": {"properties": {"const": {"properties": {}}}}}, '{"properties": {"properties": {}}}', True),
    ],
)  # fmt: skip
def test_an_object_is_generated_with_the_properties_that_are_named(
    schema: Any, text: str, sound: bool
) -> None:
    tokenizer = llguidance.LLTokenizer("byte")
    grammar = serialise("json", json.dumps(schema), schema_options(white_space=True))
    matcher = llguidance.LLMatcher(tokenizer, grammar, limits=LIMITS, log_level=0)
    assert (matcher.try_consume_tokens(tokenizer.tokenize_str(text)) == len(text)) is sound


def bounded(kind: str, text: str) -> tuple[BoundedGrammar, torch.Tensor]:
    tokenizer = llguidance.LLTokenizer(TOKENIZER, n_vocab=2048, eos_token=0)
    matcher = llguidance.LLMatcher(tokenizer, serialise(kind, text, {}), limits=LIMITS, log_level=0)
    return BoundedGrammar(matcher, tokenizer, 2048), torch.zeros((1, 64), dtype=torch.int32)


def test_a_step_of_an_ambiguous_grammar_is_bounded_and_its_request_ends() -> None:
    grammar, mask = bounded("grammar", AMBIGUOUS)
    letter = llguidance.LLTokenizer(TOKENIZER, n_vocab=2048, eos_token=0).tokenize_str("a")[-1]
    accepted, longest = True, 0.0
    for _ in range(64):
        began = time.thread_time()
        grammar.fill_bitmask(mask, 0)
        accepted = accepted and grammar.accept_tokens("x", [letter])
        longest = max(longest, time.thread_time() - began)
    assert not accepted
    assert grammar.exceeded
    assert longest < 0.1


def test_a_request_ends_when_it_used_its_time() -> None:
    grammar, mask = bounded("regex", "[a-z ]*")
    grammar._spend(10)
    assert not grammar.accept_tokens("x", [5])
    honest, _ = bounded("regex", "[a-z ]*")
    honest.fill_bitmask(mask, 0)
    assert not honest.exceeded


def test_a_step_that_takes_too_long_ends_its_costliest_requests() -> None:
    grammars = [bounded("regex", "a*")[0] for _ in range(4)]
    for grammar, seconds in zip(grammars, (0.0004, 0.5, 0.02, 0.3), strict=True):
        grammar.last = seconds
    end_costly(grammars)
    assert [grammar.exceeded for grammar in grammars] == [False, True, False, True]


@pytest.mark.parametrize(
    ("kind", "text"),
    [("structural_tag", "[]"), ("structural_tag", "3"), ("json", "3")],
)
def test_what_cannot_be_understood_is_refused(checks: GrammarChecks, kind: str, text: str) -> None:
    assert kind in verdict(checks, **{kind: text}).fault
