"""Prefix-cache keys that are exact and share all that can be shared.

A cached block may be reused when its tokens, and every edit at or before its end, are the same.
vLLM chains each block's hash to its parent's, so a block needs its own key only for the edits
*inside* it: the adapter's digest, and which of the block's tokens are edited. A block before the
first edited token therefore has no key, is the base model's, and is shared by all adapters and the
base; one after edited prefix tokens differs by digest through its parents; one that reaches the
suffix differs by where the suffix starts, and so by the prompt's length. Short prompts, whose
halves are clamped, need nothing more, nor do requests that name their prompt's end. A strength
other than 1 is part of the edits, and so of their blocks' keys. A LoRA acts on every token, so an
adapter that holds one shares no block.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.request import Request

from reft_serve.engine.adapter_ref import AdapterRef, adapter_ref

__all__ = ["edited_in", "extra_keys", "shared_tokens"]


def extra_keys(request: Request, start: int, end: int) -> list[tuple[str, str]] | None:
    """The adapter's part of the key of the block with tokens [start, end); None where vLLM's own
    rule applies.
    """
    identity = adapter_ref(request.lora_request)
    if identity is None:
        return None
    edited = edited_in(identity, request.num_prompt_tokens, start, end)
    times = "" if identity.strength == 1 or not edited else f"*{identity.strength!r}"
    return [("lora", f"reft:{identity.digest}{times}:{edited}")] if edited or identity.lora else []


def edited_in(
    identity: AdapterRef, prompt_len: int, start: int, end: int
) -> tuple[tuple[int, ...], ...]:
    """The edited spans inside [start, end), as (start, stop, part)."""
    clipped = (
        (max(s.start, start), min(s.stop, end), int(s.part)) for s in identity.spans(prompt_len)
    )
    return tuple(span for span in clipped if span[0] < span[1])


def shared_tokens(identity: AdapterRef, prompt_len: int, cached: int, block: int) -> int:
    """Number of a request's first `cached` tokens that came from blocks (of `block` tokens) shared
    by all adapters and the base.
    """
    if identity.lora:
        return 0
    first = min((span.start for span in identity.spans(prompt_len)), default=cached)
    return cached if cached <= first else first - first % block


def wrap_generate_block_hash_extra_keys(original: Any) -> Any:
    """Wrap vLLM's `generate_block_hash_extra_keys`: its keys, with our adapter part in place of
    name and path.
    """

    def generate(
        request: Request, start: int, end: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        ours = extra_keys(request, start, end)
        keys, mm_idx = original(request, start, end, start_mm_idx)
        if ours is None:
            return keys, mm_idx
        kept = [key for key in keys or () if key[0] != "lora"]
        return tuple(ours + kept) or None, mm_idx

    return generate
