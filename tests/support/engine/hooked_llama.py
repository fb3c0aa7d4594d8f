"""A Llama in plain Hugging Face and float64, with an adapter's edits as forward hooks: what an
engine must answer.

The model is causal, so one pass over prompt and answer gives what prefill, decoding, chunks and
recomputation give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from reft_serve.adapters.directory import Adapter
from reft_serve.interventions.kinds import Weights, edit
from tests.support.paths import GOLDEN


class HookedLlama:
    """Adapters may edit block outputs only."""

    def __init__(self, folder: Path = GOLDEN / "models" / "tiny-llama") -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self._model = model.eval()

    @torch.no_grad()
    def logprobs(
        self, adapter: Adapter | None, prompt: Sequence[int], answer: Sequence[int]
    ) -> Tensor:
        """(tokens, vocabulary): row i is the distribution of the token after i, over prompt and
        answer but its last.
        """
        tokens = [*prompt, *answer][: max(len(prompt), len(prompt) + len(answer) - 1)]
        with self._hooked(adapter, len(prompt), len(tokens)):
            logits: Tensor = self._model(torch.tensor([tokens]), use_cache=False).logits[0]
        return logits.log_softmax(-1)

    @torch.no_grad()
    def states(self, adapter: Adapter | None, prompt: Sequence[int]) -> Tensor:
        """(tokens, width): the normed states that embeddings are made of."""
        with self._hooked(adapter, len(prompt), len(prompt)):
            states: Tensor = self._model.model(
                torch.tensor([list(prompt)]), use_cache=False
            ).last_hidden_state[0]
        return states

    @contextmanager
    def _hooked(self, adapter: Adapter | None, prompt_len: int, total: int) -> Iterator[None]:
        handles = []
        for k, spec in enumerate(adapter.manifest.interventions if adapter is not None else ()):
            assert adapter is not None
            assert spec.component == "block_output"
            rule = adapter.manifest.positions
            prefix, suffix = rule.indices(prompt_len) if rule.phase != "generated" else ([], [])
            later = list(range(prompt_len, total)) if rule.edits_generated else []
            at = {"both": prefix + suffix + later, "prefix": prefix, "suffix": suffix}[spec.part]
            layer = self._model.model.layers[spec.layer]
            handles.append(layer.register_forward_hook(_editing(_doubled(adapter.weights[k]), at)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _doubled(weights: Weights) -> Weights:
    tensors = {name: tensor.double() for name, tensor in weights.tensors().items()}
    return Weights.of(weights.kind, tensors, weights.activation)


def _editing(weights: Weights, at: list[int]) -> Any:
    def change(_: Any, __: Any, output: Any) -> Any:
        h = (output if isinstance(output, Tensor) else output[0]).clone()
        h[0, at] = edit(h[0, at], weights)
        return h if isinstance(output, Tensor) else (h, *output[1:])

    return change
