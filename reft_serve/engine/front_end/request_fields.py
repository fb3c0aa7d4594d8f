"""The fields of a request that ReFT adds to vLLM's: the strength of an adapter's edits, and the
length of the prompt that its position rule counts.
"""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from reft_serve.engine.adapter_ref import (
    adapter_ref,
    with_prompt_tokens,
    with_strength,
)

__all__ = [
    "PROMPT_TOKENS",
    "STRENGTH",
    "at_strength",
    "end_prompt",
    "prompt_tokens_of",
    "strength_of",
]

STRENGTH = "reft_strength"
PROMPT_TOKENS = "reft_prompt_tokens"
_MOST = 100.0


def strength_of(params: Any) -> float | None:
    """The factor on the adapter's edits that a request sets, or None.

    Raises:
        VLLMValidationError: it is not a number that edits can be multiplied by.
    """
    strength = (getattr(params, "extra_args", None) or {}).get(STRENGTH)
    if strength is None:
        return None
    # NaN too
    if (
        isinstance(strength, bool)
        or not isinstance(strength, int | float)
        or not abs(strength) <= _MOST
    ):
        raise VLLMValidationError(
            f"{STRENGTH} must be a number from -{_MOST:g} to {_MOST:g}: 1 is the adapter as it "
            "was trained, 0 the base model",
            parameter=f"vllm_xargs.{STRENGTH}",
            value=str(strength)[:100],
        )
    return float(strength)


def prompt_tokens_of(params: Any, request_id: str) -> int | None:
    """Length in tokens of a request's prompt for the position rule; None if the request does not
    say.

    Raises:
        VLLMValidationError: it is not a number of tokens, or the list has none for this prompt.
    """
    count = (getattr(params, "extra_args", None) or {}).get(PROMPT_TOKENS)
    if isinstance(count, list):
        # One request of the server may have several prompts, with one `extra_args` for all. It
        # numbers their ids.
        at = request_id.rpartition("-")[2] if len(count) > 1 else "0"
        count = count[int(at)] if at.isdecimal() and int(at) < len(count) else count
    if count is None or (isinstance(count, int) and not isinstance(count, bool) and count >= 1):
        return count
    raise _wrong_prompt_tokens(
        "must be the number of tokens, at least 1, before the answer; a list has one per prompt",
        count,
    )


def end_prompt(request: Any, prompt_tokens: int) -> None:
    ids = request.prompt_token_ids
    embeds = request.prompt_embeds
    total = len(ids) if ids is not None else len(embeds)
    if prompt_tokens > total:
        raise _wrong_prompt_tokens(
            f"is {prompt_tokens}, and the prompt with its answer has {total} tokens", prompt_tokens
        )
    identity = adapter_ref(request.lora_request)
    # A request that names the end that its edits have anyway is not another adapter to a batch.
    if identity is not None and identity.rule.spans(prompt_tokens) != identity.rule.spans(total):
        request.lora_request = with_prompt_tokens(request.lora_request, prompt_tokens)


def _wrong_prompt_tokens(fault: str, value: object) -> VLLMValidationError:
    parameter = f"vllm_xargs.{PROMPT_TOKENS}"
    return VLLMValidationError(
        f"{PROMPT_TOKENS} {fault}", parameter=parameter, value=str(value)[:100]
    )


def at_strength(bound: LoRARequest | None, strength: float | None) -> LoRARequest | None:
    if strength is None:
        return bound
    identity = adapter_ref(bound)
    if bound is None or identity is None:
        raise VLLMValidationError(
            f"{STRENGTH} scales a ReFT adapter's edits, but this request names no ReFT adapter",
            parameter=f"vllm_xargs.{STRENGTH}",
        )
    if strength == 0 and not identity.lora and not identity.head:  # nothing of it is left
        return None
    return bound if strength == 1 else with_strength(bound, strength)
