"""A frozen transformers model whose decoder layers are edited while it trains an adapter or samples
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

from reft_serve.interventions.modules import Intervention
from reft_serve.interventions.positions import Part, PositionRule

__all__ = ["Edit", "EditedModel", "Edits"]


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """One intervention at the output of a decoder layer; `part` is the half of an untied rule that
    it serves.
    """

    layer: int
    part: Part
    module: Intervention


@dataclass(frozen=True, slots=True, eq=False)
class Edits:
    """An adapter in training: its interventions and its position rule."""

    edits: tuple[Edit, ...]
    rule: PositionRule

    def mask(
        self, prompt_lens: Sequence[int], lens: Sequence[int], *, left: bool = False
    ) -> Tensor:
        """The edited tokens of a padded batch, bool (P, B, T), padded at the left or the right."""
        width = max(lens)
        mask_PBT = torch.zeros(len(Part), len(lens), width, dtype=torch.bool)
        for i, (prompt_len, length) in enumerate(zip(prompt_lens, lens, strict=True)):
            first = width - length if left else 0
            for span in self.rule.spans(prompt_len):
                mask_PBT[span.part, i, first + span.start : first + min(span.stop, length)] = True
        return mask_PBT


class EditedModel:
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

    @property
    def layers(self) -> int:
        return int(self.lm.config.num_hidden_layers)

    def loss(self, adapter: Edits, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """Mean cross-entropy of the answers of a batch of (prompt, answer) token lists."""
        whole = [prompt + answer for prompt, answer in rows]
        prompt_lens = [len(prompt) for prompt, _ in rows]
        lens = [len(tokens) for tokens in whole]
        ids_BT = torch.zeros(len(rows), max(lens), dtype=torch.long)
        labels_BT = torch.full_like(ids_BT, -100)
        for i, tokens in enumerate(whole):
            ids_BT[i, : lens[i]] = torch.tensor(tokens)
            labels_BT[i, prompt_lens[i] : lens[i]] = ids_BT[i, prompt_lens[i] : lens[i]]
        with self._active(adapter, adapter.mask(prompt_lens, lens)):
            # Right padding needs no attention mask: no answer token comes after it.
            logits_BTV = self.lm(input_ids=ids_BT, use_cache=False).logits
        return nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten()
        )

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[list[int]],
        new_tokens: int,
        seed: int,
        temperature: float,
        adapter: Edits | None = None,
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
        with self._active(adapter, adapter.mask(lens, lens, left=True) if adapter else None):
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
    def _active(self, adapter: Edits | None, mask_PBT: Tensor | None) -> Iterator[None]:
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
