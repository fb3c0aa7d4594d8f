"""Token types for vLLM's BERT that embeds. vLLM passes the types of a pair's tokens only to its
BERT that classifies.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

__all__ = ["with_token_types"]


def with_token_types(model: nn.Module) -> None:
    """Let a BERT that embeds take token types, as vLLM's BERT that classifies does."""
    bert = any(kind.__name__ == "BertEmbeddingModel" for kind in type(model).__mro__)
    if not bert or "token_type_ids" in inspect.signature(model.forward).parameters:
        return
    from vllm.model_executor.models.bert import _encode_token_type_ids

    forward = model.forward

    def with_types(
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Any:
        if token_type_ids is not None:
            _encode_token_type_ids(input_ids, token_type_ids)
        return forward(
            input_ids=input_ids,
            positions=positions,
            intermediate_tensors=intermediate_tensors,
            inputs_embeds=inputs_embeds,
        )

    model.forward = with_types
