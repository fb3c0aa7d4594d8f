"""lm-evaluation-harness against reft-serve: its `local-completions`, which also says where each prompt ends.

Install the harness (`pip install "lm_eval[api]"`) and give this file the arguments of `lm_eval`:

    OPENAI_API_KEY=rk-... python examples/lm_eval_model.py --model reft-completions --tasks TASK --model_args \
        model=birds,base_url=http://127.0.0.1:8080/v1/completions,tokenizer=MODEL_DIR,tokenizer_backend=huggingface,num_concurrent=4
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.openai_completions import LocalCompletionsAPI


class Scored(list[int]):
    """Prompt and answer as token ids, and how many of them are the prompt."""

    prompt_tokens: int


@register_model("reft-completions")
class ReftCompletions(LocalCompletionsAPI):
    """Scores answers with `reft_prompt_tokens`. Its prompts are token ids, as `tokenized_requests` has them by default."""

    def batch_loglikelihood_requests(
        self, chunks: Iterable[Any]
    ) -> tuple[list[Scored], list[int], list[Any]]:
        """The harness's own batch, in which each prompt knows its length."""
        inputs, prompt_lengths, keys = super().batch_loglikelihood_requests(chunks)
        scored = [Scored(tokens) for tokens in inputs]
        for tokens, length in zip(scored, prompt_lengths, strict=True):
            tokens.prompt_tokens = length
        return scored, prompt_lengths, keys

    def _create_payload(
        self, messages: Any, generate: bool = False, **options: Any
    ) -> dict[str, Any]:
        payload: dict[str, Any] = super()._create_payload(messages, generate=generate, **options)
        if not generate:
            payload["reft_prompt_tokens"] = [tokens.prompt_tokens for tokens in messages]
        return payload


if __name__ == "__main__":
    cli_evaluate()
