"""Faults of an adapter reach the caller as data, wherever in the engine they were found."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.lora.request import LoRARequest

from reft_serve.adapters.engine_fault import ALREADY_LOADED, EngineFault
from reft_serve.engine.core.admission import faults_as_text, on_every_worker
from reft_serve.engine.front_end import server_answers
from reft_serve.errors import AdapterUnsupported, ReftError, ServiceError

FAULTS = ("its LoRA is for model.x; and not for y", "cannot be used: a line\nwith words of ours")


def answer(exc: Exception | None, loaded: tuple[str, ...] = ()) -> Any:
    """What the route answers if the engine's `add_lora` raises `exc`, as vLLM's own code answers
    it.
    """

    async def load(self: Any, request: Any) -> Any:
        if request.lora_name in self.lora_requests:
            return ErrorResponse(
                error=ErrorInfo(
                    message="it has already been loaded", type="InvalidUserInput", code=400
                )
            )
        try:
            with server_answers.faults_of(request.lora_path):
                if exc is not None:
                    raise exc
        except Exception as error:
            return ErrorResponse(
                error=ErrorInfo(message=str(error), type="InternalServerError", code=500)
            )
        return "Success"

    models = SimpleNamespace(lora_requests=dict.fromkeys(loaded))
    request = SimpleNamespace(lora_name="a", lora_path="/given")
    return asyncio.run(server_answers.wrap_load_lora_adapter(load)(models, request))


def from_a_worker(exc: Exception) -> Exception:
    """How a worker's failure comes to a front end: vLLM carries the text of the core's
    exception.
    """
    executor = SimpleNamespace(collective_rpc=lambda _, args: [None, EngineFault.of(exc)])
    with pytest.raises(ServiceError) as raised, faults_as_text():
        on_every_worker(executor, "reft_add", LoRARequest("a", 1, "/stored"))
    return Exception(f"Call to add_lora method failed: {raised.value}")


@pytest.mark.parametrize("where", ["front end", "worker"])
def test_faults_of_an_adapter_are_a_400_that_lists_them(where: str) -> None:
    refused = AdapterUnsupported("/given", FAULTS)
    error = answer(refused if where == "front end" else from_a_worker(refused)).error
    assert (error.type, error.code, error.param) == ("AdapterUnsupported", 400, "lora_path")
    assert error.message == str(refused)
    body = json.loads(ErrorResponse(error=error).model_dump_json())
    assert EngineFault.in_answer(json.dumps(body).encode()).faults == FAULTS


def test_a_failure_of_the_engine_stays_one() -> None:
    for exc in (RuntimeError("out of memory"), from_a_worker(RuntimeError("out of memory"))):
        error = answer(exc).error
        assert (error.type, error.code, error.message) == (
            "InternalServerError",
            500,
            "out of memory",
        )


def test_a_name_that_is_taken_is_told_by_the_type() -> None:
    assert answer(None, loaded=("a",)).error.type == ALREADY_LOADED
    assert answer(None) == "Success"


@pytest.mark.parametrize(
    "content",
    [b"no json", b"[]", b'{"error": "text"}', b'{"object": "error", "message": "m"}', b"7"],
)
def test_an_answer_of_any_shape_is_read(content: bytes) -> None:
    fault = EngineFault.in_answer(content)
    assert fault.message
    assert fault.faults == ()


def test_a_missing_template_names_its_field_and_stays_vllm_s_own_error() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.chat_utils import ChatTemplateResolutionError

    def apply(*_: Any) -> None:
        raise ChatTemplateResolutionError("none")

    with pytest.raises(ChatTemplateResolutionError) as caught:  # as vLLM's warm-up expects it
        server_answers.wrap_safe_apply_chat_template(apply)()
    assert isinstance(caught.value, VLLMValidationError)
    assert caught.value.parameter == "chat_template"
    assert not isinstance(caught.value, ReftError)
