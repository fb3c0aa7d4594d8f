"""What a worker finds wrong with an adapter is the caller's fault, also if it comes through the engine's core as text."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from reft_serve.engine.front_end import wrap_load_lora_adapter


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            "Call to add_lora method failed: adapter /store/ab cannot be used: its LoRA is for model.x, which is no module",
            "adapter /given cannot be used: its LoRA is for model.x, which is no module",
        ),
        ("adapter /a b/c cannot be used: one; two", "adapter /given cannot be used: one; two"),
    ],
)
def test_a_refusal_of_a_worker_is_a_400(message: str, told: str) -> None:
    error = SimpleNamespace(type="InternalServerError", code=500, param=None, message=message)

    async def load(self: object, request: object) -> object:
        return SimpleNamespace(error=error)

    request = SimpleNamespace(lora_path="/given")
    asyncio.run(wrap_load_lora_adapter(load)(SimpleNamespace(), request))
    assert (error.type, error.code, error.param) == ("BadRequestError", 400, "lora_path")
    assert error.message == told
