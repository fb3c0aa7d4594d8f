"""The fields of an inference request that OpenAI does not have: how strong an adapter's edits are,
where its prompt ends, and what its chat template is given.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from reft_serve.database.resolution import Target
from reft_serve.errors import RequestInvalid

__all__ = ["WARNING_HEADER", "check", "move_to_engine", "warnings"]

WARNING_HEADER = "x-reft-warning"
_STRENGTH = "reft_strength"
_PROMPT_TOKENS = "reft_prompt_tokens"
_TEMPLATE = "chat_template_kwargs"
# The one rule that edits the same token wherever the prompt ends.
_FIXED_POSITIONS = "first"


def check(
    body: Mapping[str, Any], max_strength: float, template_arguments: Collection[str]
) -> None:
    """Check what the schema of a request cannot say.

    Raises:
        RequestInvalid: a strength beyond the limit, prompt ends that are not one per prompt or lie
            behind their prompt, or an argument of the chat template that is not allowed.
    """
    if abs(body.get(_STRENGTH, 0)) > max_strength:
        raise RequestInvalid(
            f"{_STRENGTH} is from -{max_strength:g} to {max_strength:g} here", _STRENGTH
        )
    unknown = sorted(set(body.get(_TEMPLATE, ())) - set(template_arguments))
    if unknown:
        raise RequestInvalid(
            f"{unknown[0][:64]!r} is not an allowed chat template argument; allowed: "
            f"{', '.join(template_arguments) or 'none'}",
            f"{_TEMPLATE}.{unknown[0][:64]}",
        )
    if _PROMPT_TOKENS in body:
        _check_ends(body[_PROMPT_TOKENS], body["prompt"])


def _check_ends(lengths: int | list[int], prompt: Any) -> None:
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    ends = lengths if isinstance(lengths, list) else [lengths] * len(prompts)
    if len(ends) != len(prompts):
        raise RequestInvalid(
            f"{_PROMPT_TOKENS} has {len(ends)} numbers for {len(prompts)} prompts: it has one per "
            "prompt",
            _PROMPT_TOKENS,
        )
    for end, tokens in zip(ends, prompts, strict=True):
        if isinstance(tokens, list) and end > len(tokens):
            raise RequestInvalid(
                f"{_PROMPT_TOKENS} is {end}, and the prompt with its answer has {len(tokens)} "
                "tokens",
                _PROMPT_TOKENS,
            )


def move_to_engine(body: dict[str, Any], target: Target | None) -> None:
    """Put our fields where the engine's plugin reads them. The base model has no edits, so it gets
    none.
    """
    fields = {name: body.pop(name) for name in (_STRENGTH, _PROMPT_TOKENS) if name in body}
    if fields and target is not None:
        body["vllm_xargs"] = fields


def warnings(body: Mapping[str, Any], target: Target | None) -> dict[str, str]:
    """Headers about an answer that is probably not what was meant: a scored answer that the adapter
    took for its prompt.
    """
    scored = body.get("echo") and body.get("logprobs") is not None and _PROMPT_TOKENS not in body
    if not scored or target is None or target.positions == _FIXED_POSITIONS:
        return {}
    return {
        WARNING_HEADER: f"{target.label} edits tokens relative to the prompt's end, so an answer "
        f"inside the prompt is edited as prompt; send {_PROMPT_TOKENS}, the number of "
        "tokens before the answer"
    }
