"""Pairs of texts to classify, tokenised as pairs, with token types if the base was trained with
them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError

__all__ = ["PAIR", "wrap_preprocessing"]

PAIR = "text_pair"
# vLLM's name for the index of the second text's first token.
_TYPES = "compressed_token_type_ids"
# Architectures whose forward takes token types, in vLLM or by `worker.token_types`. Any other would
# fail in the middle of a step.
_TYPED = ("Bert", "Roberta", "XLMRoberta")


def wrap_preprocessing(original: Any) -> Callable[..., Any]:
    """Around `PoolingBaseServing._preprocessing`: reads a request's `text_pair` next to its
    `input`.
    """

    async def preprocessing(self: Any, io_processor: Any, ctx: Any) -> None:
        pair = (getattr(ctx.request, "model_extra", None) or {}).get(PAIR)
        if pair is None or io_processor.name != "classify":
            await original(self, io_processor, ctx)
            return
        typed = _takes_types(self.model_config)
        firsts, seconds = _checked(ctx.request, pair)
        limits = ctx.request.build_tok_params(self.model_config)
        # In vLLM's own thread for tokenising: the event loop serves others meanwhile.
        ids, starts = await asyncio.get_running_loop().run_in_executor(
            self._executor, _tokenise, self.renderer.tokenizer, limits, firsts, seconds
        )
        ctx.request.input = ids
        await original(self, io_processor, ctx)
        for engine_input, start in zip(ctx.engine_inputs, starts, strict=True):
            if start is not None and typed:
                params = engine_input["params"].clone()
                params.extra_kwargs = {**(params.extra_kwargs or {}), _TYPES: start}
                params.verify(self.model_config)
                engine_input["params"] = params

    return preprocessing


def _takes_types(config: ModelConfig) -> bool:
    hf_config = config.hf_config
    kinds = getattr(hf_config, "type_vocab_size", 0)  # RoBERTa has one
    rotary = getattr(hf_config, "position_embedding_type", "absolute") != "absolute"
    return kinds > 1 and not rotary and config.architecture.startswith(_TYPED)


def _checked(request: Any, pair: object) -> tuple[list[str], list[str]]:
    firsts = _texts(getattr(request, "input", None))
    seconds = _texts(pair)
    if not firsts or len(firsts) != len(seconds):
        raise VLLMValidationError(
            f"{PAIR} must be a text if input is a text, or a list of as many texts as input",
            parameter=PAIR,
        )
    if request.truncate_prompt_tokens is not None:
        raise VLLMValidationError(
            f"a request with {PAIR} cannot be truncated", parameter="truncate_prompt_tokens"
        )
    return firsts, seconds


def _texts(value: object) -> list[str]:
    """The texts; empty if one of them is not a text."""
    value = value if isinstance(value, list) else [value]
    texts = [text for text in value if isinstance(text, str)]
    return texts if len(texts) == len(value) else []


def _tokenise(
    tokenizer: Any, limits: Any, firsts: list[str], seconds: list[str]
) -> tuple[list[list[int]], list[int | None]]:
    """The tokens of each pair, and where the tokens of type 1 begin, if there are any."""
    for first, second in zip(firsts, seconds, strict=True):
        # Refuses what is too long before it is tokenised.
        limits.apply_pre_tokenization(tokenizer, {"prompt": first + second})
    encoded = tokenizer(firsts, seconds)
    types = encoded.get("token_type_ids") or [[]] * len(firsts)
    return encoded["input_ids"], [each.index(1) if 1 in each else None for each in types]
