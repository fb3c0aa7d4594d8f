"""Fields of OpenAI's and Anthropic's clients, and of programs built on them, that have no effect
here.

They are accepted with any value and reach no engine. docs/gateway-api.md shows these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["IGNORED", "REFUSED", "ignored_in"]

_CACHE = "a hint for another service's prompt cache; prompts are cached without it"
_ECHO = "part of an earlier response that a client sends back"
_FRAMEWORK = "bookkeeping of a framework (LangChain, LiteLLM, Vercel AI SDK, OpenRouter)"

IGNORED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "request": {
            "cache_control": _CACHE,
            "prediction": "a prediction that can only speed up the same answer",
            "prompt_cache_key": _CACHE,
            "prompt_cache_options": _CACHE,
            "prompt_cache_retention": _CACHE,
            "safety_identifier": "an identifier of the caller's end user",
            "service_tier": "there is only one service tier",
            "store": "nothing is stored",
            "verbosity": "the model has no such control",
        },
        "stream_options": {"include_obfuscation": "nothing is padded"},
        "message": {
            "additional_kwargs": _FRAMEWORK,
            "annotations": _ECHO,
            "cache_control": _CACHE,
            "createdAt": _FRAMEWORK,
            "example": _FRAMEWORK,
            "experimental_providerMetadata": _FRAMEWORK,
            "finish_reason": _ECHO,
            "id": _ECHO,
            "invalid_tool_calls": _FRAMEWORK,
            "logprobs": _ECHO,
            "parsed": "added by the `openai` package's parse() to a message",
            "parts": _FRAMEWORK,
            "phase": _ECHO,
            "providerMetadata": _FRAMEWORK,
            "providerOptions": _FRAMEWORK,
            "provider_specific_fields": _FRAMEWORK,
            "reasoning_details": _FRAMEWORK,
            "refusal": _ECHO,
            "response_metadata": _FRAMEWORK,
            "status": _ECHO,
            "thinking_blocks": _FRAMEWORK,
            "usage_metadata": _FRAMEWORK,
        },
        "content part": {
            "annotations": _ECHO,
            "cache_control": _CACHE,
            "citations": _ECHO,
            "id": _ECHO,
            "index": _ECHO,
            "logprobs": _ECHO,
            "prompt_cache_breakpoint": _CACHE,
            "providerMetadata": _FRAMEWORK,
            "providerOptions": _FRAMEWORK,
            "provider_specific_fields": _FRAMEWORK,
        },
        "tool": {
            "allowed_callers": "there is only one caller",
            "async": "the caller decides when a tool runs",
            "cache_control": _CACHE,
            "defer_loading": "every tool is shown to the model",
            "output_schema": "tools run on the client, which can check their results",
        },
        "tool call": {
            "async": _ECHO,
            "cache_control": _CACHE,
            "caller": _ECHO,
            "extra_content": _FRAMEWORK,
            "index": "a position in the stream that delivered the call",
            "parsed_arguments": "added by the `openai` package's parse() to the arguments",
            "provider_specific_fields": _FRAMEWORK,
        },
        "tool output": {"name": _ECHO, "namespace": _ECHO},
        "input item": {
            "async": _ECHO,
            "cache_control": _CACHE,
            "caller": _ECHO,
            "id": "nothing is stored, so nothing can be referenced",
            "phase": _ECHO,
            "provider_data": _FRAMEWORK,
            "status": _ECHO,
        },
        "reasoning item": {"caller": _ECHO, "provider_data": _FRAMEWORK, "status": _ECHO},
        "text": {"verbosity": "the model has no such control"},
        "reasoning": {
            "context": "nothing is stored",
            "generate_summary": "reasoning is not summarized",
            "mode": "the model has only one reasoning mode",
            "summary": "reasoning is not summarized",
        },
    }
)
"""Ignored fields by object, each with the reason."""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "access_programs": "programs of OpenAI's",
        "audio": "text only",
        "background_options": "background responses are not supported",
        "context_management": "nothing is stored or compacted",
        "conversation": "nothing is stored",
        "encrypted_content": "only the service that wrote it can read it",
        "function_call": "use `tool_choice`; in a message, `tool_calls`",
        "functions": "use `tools`",
        "image": "text only",
        "moderation": "there is no moderation",
        "previous_response_id": "nothing is stored: send the whole conversation",
        "prompt": "stored prompts are not supported",
        "web_search_options": "web search is not supported",
    }
)
"""Fields of the `openai` client for unsupported features, each with the reason."""


def ignored_in(*objects: str) -> Mapping[str, str]:
    """The ignored fields of these objects together."""
    return {name: reason for each in objects for name, reason in IGNORED[each].items()}
