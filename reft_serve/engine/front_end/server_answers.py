"""Answers of vLLM's server that say more here: the faults of an adapter as data, a missing chat
template, the engine's limits on its model card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import ChatTemplateResolutionError

from reft_serve.adapters.engine_card import CARD_KEY
from reft_serve.adapters.engine_fault import ALREADY_LOADED, CHAT_TEMPLATE, EngineFault
from reft_serve.engine.vllm_config import (
    engine_card,
)
from reft_serve.errors import ClientError

__all__ = ["ChatTemplateMissing", "faults_of"]

# What `add_lora` raised, for the route that called it: vLLM's own code keeps its text alone.
_refusals: ContextVar[list[ClientError] | None] = ContextVar("reft_refusals", default=None)


@contextmanager
def faults_of(path: str) -> Iterator[None]:
    """Raise what the engine core met, whose exceptions come as text, and note what is the caller's
    to fix.
    """
    try:
        yield
    except Exception as exc:
        fault = EngineFault.in_text(str(exc))
        error = exc if fault is None else fault.error(path)
        refusals = _refusals.get()
        if refusals is not None and isinstance(error, ClientError):
            refusals.append(error)
        if fault is None:
            raise
        raise error from exc


def wrap_load_lora_adapter(original: Any) -> Callable[..., Any]:
    """Around `OpenAIServingModels.load_lora_adapter`: an adapter's faults are the caller's to fix,
    so 400 and not 500.

    The error's `type` is the failure's class and its `faults` are all that was found, as data.
    """

    async def load_lora_adapter(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        refusals: list[ClientError] = []
        noting = _refusals.set(refusals)
        try:
            answer = await original(self, request, *args, **kwargs)
        finally:
            _refusals.reset(noting)
        error = getattr(answer, "error", None)
        if error is None:
            return answer
        if refusals:
            fault = EngineFault.of(refusals[0])
            error.type = fault.type
            error.code = 400
            error.param = "lora_path"
            error.message = fault.message
            error.faults = list(fault.faults)
        elif error.type == "InvalidUserInput" and request.lora_name in self.lora_requests:
            error.type = ALREADY_LOADED
        return answer

    return load_lora_adapter


class ChatTemplateMissing(VLLMValidationError, ChatTemplateResolutionError):  # type: ignore[misc]  # vLLM is untyped here
    """vLLM's error for a base model without a chat template, with the field that its answer
    names.
    """


def wrap_safe_apply_chat_template(original: Any) -> Callable[..., Any]:
    """Around `safe_apply_chat_template`: the answer's `param` says that the base model has no chat
    template.
    """

    def safe_apply_chat_template(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except ChatTemplateResolutionError as exc:
            raise ChatTemplateMissing(str(exc), parameter=CHAT_TEMPLATE) from exc

    return safe_apply_chat_template


def wrap_show_available_models(original: Any) -> Callable[..., Any]:
    """Around `OpenAIServingModels.show_available_models`: the base model's card says which adapters
    are taken.
    """

    async def show_available_models(self: Any) -> Any:
        listed = await original(self)
        config = self.engine_client.vllm_config
        if config.lora_config is not None:
            limits = engine_card(config).model_dump(mode="json")
            for card in listed.data:
                if card.parent is None:
                    setattr(card, CARD_KEY, limits)
        return listed

    return show_available_models


def wrap_unload_lora_adapter(original: Any) -> Callable[..., Any]:
    """Around `OpenAIServingModels.unload_lora_adapter`, which only forgets the name: give the
    engine its memory back.
    """

    async def unload_lora_adapter(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        known = self.lora_requests.get(request.lora_name)
        answer = await original(self, request, *args, **kwargs)
        if known is not None and request.lora_name not in self.lora_requests:
            await self.engine_client.remove_lora(known.lora_int_id)
        return answer

    return unload_lora_adapter
