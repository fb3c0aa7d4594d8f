"""The tokens that a request used, as engines count them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Tokens"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token usage. `cached` is included in `prompt`."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    @classmethod
    def of(cls, usage: dict[str, Any] | None) -> Tokens:
        """From any of OpenAI's usage objects."""
        usage = usage or {}
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        prompt = usage.get("prompt_tokens", usage.get("input_tokens", 0))
        completion = usage.get("completion_tokens", usage.get("output_tokens", 0))
        cached = details.get("cached_tokens", usage.get("cached_tokens", 0))
        return cls(prompt or 0, cached or 0, completion or 0)

    @property
    def work(self) -> int:
        """Tokens that an engine computed."""
        return self.prompt - self.cached + self.completion
