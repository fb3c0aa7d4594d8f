"""DistilBERT for vLLM, which has none of its own: a BERT without token types, whose tensors have
other names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.bert import BertEmbeddingModel, BertLayer

__all__ = ["DistilBertEmbeddingModel"]

_NAMES = (
    ("transformer.layer.", "encoder.layer."),
    (".attention.q_lin.", ".attention.self.query."),
    (".attention.k_lin.", ".attention.self.key."),
    (".attention.v_lin.", ".attention.self.value."),
    (".attention.out_lin.", ".attention.output.dense."),
    (".sa_layer_norm.", ".attention.output.LayerNorm."),
    (".ffn.lin1.", ".intermediate.dense."),
    (".ffn.lin2.", ".output.dense."),
    (".output_layer_norm.", ".output.LayerNorm."),
)
_HEADS = ("vocab_", "pre_classifier.", "classifier.", "qa_outputs.")
_EPSILON = 1e-12


class DistilBertLayer(BertLayer):  # type: ignore[misc]  # vllm is not type-checked
    """A layer whose attention ends after the norm here, but before it in transformers.
    `hook_points` finds it by its name.
    """


class DistilBertEmbeddingModel(BertEmbeddingModel):  # type: ignore[misc]  # vllm is not type-checked
    """vLLM's BERT with DistilBERT's weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config: Any = vllm_config.model_config.hf_config
        config.intermediate_size, config.hidden_act = config.hidden_dim, config.activation
        config.layer_norm_eps, config.type_vocab_size = _EPSILON, 2
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for layer in self.model.encoder.layer:
            layer.__class__ = DistilBertLayer

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Under BERT's names, and with token types that add nothing."""
        loaded: set[str] = super().load_weights(self._renamed(weights))
        return loaded

    def _renamed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        yield "embeddings.token_type_embeddings.weight", torch.zeros(2, self.config.dim)
        for name, tensor in weights:
            short = name.removeprefix("distilbert.")
            if short.startswith(_HEADS):
                continue
            for theirs, ours in _NAMES:
                short = short.replace(theirs, ours)
            yield short, tensor
