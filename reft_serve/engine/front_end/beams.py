"""Beam search, which vLLM runs one token at a time, each time with the answer so far as part of the
prompt.

A position rule would count that as the prompt's end, and edit the answer, so such requests are
refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from reft_serve.engine.adapter_ref import adapter_ref
from reft_serve.engine.front_end.binding import binder_of

__all__ = ["wrap_beam_search"]


def wrap_beam_search(original: Any) -> Callable[..., Any]:
    """Around `beam_search` of vLLM's `LLM` and of its server; base and LoRA requests continue as
    they are.
    """
    signature = inspect.signature(original)

    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        lora_request = signature.bind(self, *args, **kwargs).arguments.get("lora_request")
        requests = (
            [lora_request]
            if lora_request is None or isinstance(lora_request, LoRARequest)
            else lora_request
        )
        binder = binder_of(self.llm_engine if hasattr(self, "llm_engine") else self.engine_client)
        if any(adapter_ref(binder.bind(request)) is not None for request in requests):
            raise VLLMValidationError(
                "beam search is not supported with a ReFT adapter, whose edits belong to the "
                "prompt and not to the beams: leave out use_beam_search, or ask for n samples",
                parameter="use_beam_search",
            )
        return original(self, *args, **kwargs)

    return beam_search
