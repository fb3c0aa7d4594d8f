"""Adapter data that travels with each request: digest, position rule, strength and prompt length.

The front end reads and checks a directory once and binds every request to the result. From there
the request itself says which edits it gets, so the scheduler needs no file for its prefix-cache
keys, the worker knows whether it holds the right version, and a directory that changes meanwhile
cannot mix two versions in one answer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

from vllm.lora.request import LoRARequest

from reft_serve.interventions.positions import PositionRule, Span

__all__ = [
    "FIRST_ID",
    "GENERATED",
    "IDS",
    "WITH_LORA",
    "AdapterRef",
    "adapter_ref",
    "bound_request",
    "lora_id_of",
    "with_engine_id",
    "with_prompt_tokens",
    "with_strength",
]

_MARK = "reft:"
# Adapters of ours get engine ids from 2**28 on, derived from the digest, so that equal versions are
# one adapter to the scheduler and a reloaded name is another; vLLM's own counter stays below. One
# bit says that generated tokens are edited too, another that the adapter holds a LoRA, so that a
# step can tell by its array of ids alone who needs what.
FIRST_ID = 1 << 28
GENERATED = 1 << 29
WITH_LORA = 1 << 30
IDS = 1 << 28


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One immutable version: its digest (sha256 in hex), its positions, whether it holds a LoRA,
    the factor on its edits, which is not one on the LoRA, and whether it has a classifier head.

    prompt_tokens: where the prompt ends for the position rule, if the tokens after it are an answer
    to be scored. None:
        where the request's own prompt ends.
    """

    digest: str
    rule: PositionRule
    lora: bool = False
    strength: float = 1.0
    prompt_tokens: int | None = None
    head: bool = False

    def spans(self, prompt_len: int) -> list[Span]:
        """The edited tokens of a request with `prompt_len` prompt tokens, as `PositionRule.spans`;
        none at strength 0.
        """
        return self.rule.spans(self.prompt_tokens or prompt_len) if self.strength else []

    @property
    def engine_id(self) -> int:
        """The `lora_int_id` that a front end gives it, for any strength. Two identities may share
        one: the engine core then moves the later one (`admission.Admission`), so that inside the
        engine an id is one identity's.
        """
        first = GENERATED if self.rule.edits_generated else FIRST_ID
        return first + (WITH_LORA if self.lora else 0) + int(self.digest[:7], 16)


def lora_id_of(digest: str) -> int:
    """The id of a version's LoRA in a worker's LoRA manager, for any strength: 60 bits of the
    digest.
    """
    return (1 << 61) + int(digest[:15], 16)


def bound_request(request: LoRARequest, path: str, identity: AdapterRef) -> LoRARequest:
    """The request as the engine sees it. `base_model_name`, which only the front end's model list
    reads, carries it.
    """
    carried = _MARK + json.dumps(asdict(identity))
    return LoRARequest(request.lora_name, identity.engine_id, path, base_model_name=carried)


def with_strength(request: LoRARequest, strength: float) -> LoRARequest:
    """A bound request whose edits are multiplied by `strength`."""
    identity = adapter_ref(request)
    assert identity is not None
    return bound_request(request, request.lora_path, replace(identity, strength=strength))


def with_prompt_tokens(request: LoRARequest, prompt_tokens: int) -> LoRARequest:
    """A bound request whose prompt ends after `prompt_tokens` tokens, for the position rule."""
    identity = adapter_ref(request)
    assert identity is not None
    return bound_request(request, request.lora_path, replace(identity, prompt_tokens=prompt_tokens))


def with_engine_id(request: LoRARequest, engine_id: int) -> LoRARequest:
    """A bound request under another id."""
    return LoRARequest(
        request.lora_name, engine_id, request.lora_path, base_model_name=request.base_model_name
    )


def adapter_ref(request: LoRARequest | None) -> AdapterRef | None:
    """The identity that a request carries, or None for a base or a LoRA request."""
    carried = request.base_model_name if request is not None else None
    return _parse(carried) if carried is not None and carried.startswith(_MARK) else None


@lru_cache(maxsize=1 << 16)
def _parse(carried: str) -> AdapterRef:
    fields = json.loads(carried.removeprefix(_MARK))
    return AdapterRef(fields.pop("digest"), PositionRule(**fields.pop("rule")), **fields)
