"""The engine core's side of structured outputs: llguidance with bounds on every step.

llguidance alone bounds a step by counts (items of its parser, fuel of its lexer), so that a grammar
cannot stall it for long. The time of a request's matching is counted, and a request that takes too
much ends, without the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import llguidance
import torch
from vllm.v1.structured_output.backend_guidance import GuidanceBackend, GuidanceGrammar
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar, StructuredOutputOptions

from reft_serve.engine.grammar_compiler.process import (
    LIMITS,
    MATCHING_SECONDS,
    STEP_SECONDS,
    TOKEN_SECONDS,
    schema_options,
    serialise,
)

__all__ = ["BACKEND", "EXCEEDED", "BoundedGrammar"]

BACKEND = "guidance"
EXCEEDED = "was too costly to match: it is too large or too ambiguous for a request's time limit"
# If a step takes more than STEP_SECONDS, the costliest requests end, but none that takes less than
# this.
_CHEAP = 0.001


class BoundedGrammar(GuidanceGrammar):  # type: ignore[misc]  # vLLM is untyped here
    """A matcher that refuses every token once it has used what it may."""

    exceeded = False
    last = 0.0
    _left = MATCHING_SECONDS

    def fill_bitmask(self, bitmask: torch.Tensor, idx: int) -> None:
        """As the base class, but counted."""
        began = time.thread_time()
        super().fill_bitmask(bitmask, idx)
        self.last = time.thread_time() - began
        self._spend(self.last)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """As the base class, but counted; False once a bound is exceeded."""
        if self.exceeded:
            return False
        began = time.thread_time()
        accepted = super().accept_tokens(request_id, tokens)
        self._spend(time.thread_time() - began - TOKEN_SECONDS * len(tokens))
        return accepted and not self.exceeded

    def end(self) -> None:
        """End the request with its next token."""
        self.exceeded = True

    def _spend(self, seconds: float) -> None:
        self._left = min(self._left - seconds, MATCHING_SECONDS)
        if self._left < 0 or self.ll_matcher.is_error():
            self.exceeded = True


def wrap_compile_grammar(_: Any) -> Callable[..., BoundedGrammar]:
    """In place of `GuidanceBackend.compile_grammar`, which knows no bounds. Runs on threads of
    vLLM's.
    """

    def compile_grammar(
        self: GuidanceBackend, request_type: StructuredOutputOptions, grammar_spec: str, **_: Any
    ) -> BoundedGrammar:
        if request_type != StructuredOutputOptions.GRAMMAR:  # it did not come by a front end
            options = schema_options(white_space=not self.disable_any_whitespace)
            grammar_spec = serialise(request_type.name.lower(), grammar_spec, options)
        matcher = llguidance.LLMatcher(self.ll_tokenizer, grammar_spec, limits=LIMITS, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        matcher.compute_bitmask()  # the first mask is the costly one
        return BoundedGrammar(matcher, self.ll_tokenizer, self.vocab_size)

    return compile_grammar


def wrap_manager_init(original: Any) -> Callable[..., None]:
    """Around `StructuredOutputManager.__init__`: create the backend at start, independent of the
    first request.
    """

    def init(self: Any, vllm_config: Any) -> None:
        original(self, vllm_config)
        tokenizer = self.__dict__.get("tokenizer")
        if vllm_config.model_config.runner_type == "pooling":  # generates nothing
            return
        if (
            vllm_config.structured_outputs_config.backend == BACKEND
            and GuidanceBackend.is_tokenizer_supported(tokenizer)
        ):
            size = vllm_config.model_config.get_vocab_size()
            self.backend = GuidanceBackend(vllm_config, tokenizer=tokenizer, vocab_size=size)

    return init


def wrap_grammar_bitmask(original: Any) -> Callable[..., Any]:
    """Around `StructuredOutputManager.grammar_bitmask`, which a step calls for all of its
    requests.
    """

    def grammar_bitmask(
        self: Any, requests: Any, structured_output_request_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        mask = original(self, requests, structured_output_request_ids, *args, **kwargs)
        held = (
            requests[request_id].structured_output_request
            for request_id in structured_output_request_ids
        )
        end_costly(request.grammar for request in held)
        return mask

    return grammar_bitmask


def end_costly(grammars: Iterable[StructuredOutputGrammar | Future[Any]]) -> None:
    """End the costliest requests of a step until the others take no more than STEP_SECONDS."""
    bounded = [grammar for grammar in grammars if isinstance(grammar, BoundedGrammar)]
    total = sum(grammar.last for grammar in bounded)
    if total <= STEP_SECONDS:
        return
    for grammar in sorted(bounded, key=lambda grammar: grammar.last, reverse=True):
        if total <= STEP_SECONDS or grammar.last < _CHEAP:
            return
        grammar.end()
        total -= grammar.last


def wrap_accept_tokens(original: Any) -> Callable[..., bool]:
    """Around `StructuredOutputManager.accept_tokens`: say in the answer why the request ended."""

    def accept_tokens(self: Any, request: Any, new_token_ids: list[int]) -> bool:
        accepted: bool = original(self, request, new_token_ids)
        if not accepted and getattr(request.structured_output_request.grammar, "exceeded", False):
            request.stop_reason = EXCEEDED
        return accepted

    return accept_tokens
