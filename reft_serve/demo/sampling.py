"""The demo model, sampled with an adapter whose edits act at its decoder layers.
with one.

Letters: B batch, T tokens, D hidden width, P the two parts of a position rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from reft_serve.adapters.directory import Adapter
from reft_serve.interventions.modules import Intervention
from reft_serve.interventions.positions import Part, PositionRule
from reft_serve.training.model.edited_model import Edit

__all__ = ["Sampler", "SamplerEdits"]

_PARTS = {"both": Part.PREFIX, "prefix": Part.PREFIX, "suffix": Part.SUFFIX}


@dataclass(frozen=True, slots=True, eq=False)
class SamplerEdits:
    """An adapter: its interventions and its position rule."""

    edits: tuple[Edit, ...]
    rule: PositionRule

    @classmethod
    def of(cls, adapter: Adapter) -> SamplerEdits:
        """The edits of an adapter that was read from its directory."""
        pairs = zip(adapter.manifest.interventions, adapter.weights, strict=True)
        edits = tuple(
            Edit(spec.layer, _PARTS[spec.part], Intervention.of(weights)) for spec, weights in pairs
        )
        return cls(edits, adapter.manifest.positions)

    def mask(self, lens: Sequence[int]) -> Tensor:
        """The edited tokens of a batch of prompts, padded at the left: bool (P, B, T)."""
        width = max(lens)
        mask_PBT = torch.zeros(len(Part), len(lens), width, dtype=torch.bool)
        for i, length in enumerate(lens):
            first = width - length
            for span in self.rule.spans(length):
                mask_PBT[span.part, i, first + span.start : first + min(span.stop, length)] = True
        return mask_PBT


class Sampler:
    """The base model in float32 and its tokenizer. `lm` is a transformers causal language model."""

    def __init__(self, path: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.lm: Any = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            .eval()
            .requires_grad_(False)
        )
        self._edits: dict[int, list[Edit]] = {}
        self._mask_PBT: Tensor | None = None
        self._edits_generated = False
        for number, layer in enumerate(self.lm.model.layers):
            layer.register_forward_hook(partial(self._edit, number))

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[list[int]],
        new_tokens: int,
        seed: int,
        temperature: float,
        adapter: SamplerEdits | None = None,
    ) -> list[list[int]]:
        """One sampled answer per prompt: its tokens up to the end of the story."""
        lens = [len(prompt) for prompt in prompts]
        ids_BT = torch.zeros(len(prompts), max(lens), dtype=torch.long)
        seen_BT = torch.zeros_like(ids_BT)
        for i, prompt in enumerate(prompts):
            ids_BT[i, -lens[i] :] = torch.tensor(prompt)
            seen_BT[i, -lens[i] :] = 1
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 0.95}
        with self._active(adapter, adapter.mask(lens) if adapter else None):
            out = self.lm.generate(
                ids_BT, attention_mask=seen_BT, max_new_tokens=new_tokens, **options
            )
        end = self.tokenizer.eos_token_id
        answers: list[list[int]] = out[:, ids_BT.shape[1] :].tolist()
        return [answer[: answer.index(end)] if end in answer else answer for answer in answers]

    def text(self, tokens: Sequence[int]) -> str:
        """The tokens' text, special ones left out."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def tokens(self, text: str, *, prompt: bool = False) -> list[int]:
        """A text's tokens; a prompt begins with the story's start, as it does when it is served."""
        return list(self.tokenizer(text, add_special_tokens=prompt).input_ids)

    @contextmanager
    def _active(self, adapter: SamplerEdits | None, mask_PBT: Tensor | None) -> Iterator[None]:
        if adapter is not None:
            self._mask_PBT = mask_PBT
            self._edits_generated = adapter.rule.edits_generated
            for edit in adapter.edits:
                self._edits.setdefault(edit.layer, []).append(edit)
        try:
            yield
        finally:
            self._edits = {}
            self._mask_PBT = None

    def _edit(self, layer: int, _module: nn.Module, _inputs: object, h_BTD: Tensor) -> Tensor:
        for edit in self._edits.get(layer, ()):
            assert self._mask_PBT is not None
            mask_BT = self._mask_PBT[edit.part]
            if h_BTD.shape[1] == mask_BT.shape[1]:
                h_BTD = h_BTD.index_put((mask_BT,), edit.module(h_BTD[mask_BT]))
            elif self._edits_generated:  # one generated token per request, fed back
                h_BTD = edit.module(h_BTD)
        return h_BTD
