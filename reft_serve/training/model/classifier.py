"""A frozen base with edited layers and a classifier head; the head and the interventions learn.

Letters: B texts, T columns, D hidden width, N = B * T tokens, C outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from reft_serve.adapters.manifest import BaseFacts
from reft_serve.errors import BaseModelInvalid, ClientError
from reft_serve.interventions.activations import activate
from reft_serve.interventions.heads import Head
from reft_serve.interventions.vocabulary import ACTIVATION_CODES, Read
from reft_serve.training.data.batching import Batch
from reft_serve.training.model.edited_model import Edit, decoder_layers
from reft_serve.training.model.row_edit import edit_rows
from reft_serve.training.plan import HeadPlan

__all__ = ["ClassifierHead", "ClassifierModel", "LabelledBatch", "head_plan", "trunk_of"]

_FIRST_SCALE = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class LabelledBatch(Batch):
    """Padded texts with their targets: `goals` (B,) of classes, else (B, C); `token_types` (B, T)
    or None.
    """

    goals: Tensor = field(default_factory=lambda: torch.empty(0))
    token_types: Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> LabelledBatch:
        """The batch on `device`."""
        types = None if self.token_types is None else self.token_types.to(device)
        moved = Batch.to(self, device, non_blocking)
        assert isinstance(moved, LabelledBatch)
        return replace(moved, goals=self.goals.to(device), token_types=types)


class ClassifierHead(nn.Module):
    """A head that learns: `out(act(dense(h)))`, or `out(h)` alone."""

    def __init__(self, plan: HeadPlan, width: int) -> None:
        super().__init__()
        self.plan = plan
        self.dense = None if plan.activation is None else nn.Linear(width, width)
        self.out = nn.Linear(width, len(plan.labels))
        for layer in self.children():
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=_FIRST_SCALE)
            nn.init.zeros_(layer.bias)

    def forward(self, h_BD: Tensor) -> Tensor:
        """Logits (B, C)."""
        h_BD = h_BD.float()
        if self.dense is not None:
            h_BD = activate(self.dense(h_BD), ACTIVATION_CODES[self.plan.activation or "linear"])
        logits: Tensor = self.out(h_BD)
        return logits

    def weights(self) -> Head:
        """A detached copy of what has been learnt, on the CPU."""
        named = {name: tensor.detach().cpu().clone() for name, tensor in self.named_parameters()}
        return Head.of(named, ACTIVATION_CODES[self.plan.activation or "linear"])

    def restore(self, head: Head) -> None:
        """Take over what was learnt."""
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, tensor in head.tensors().items():
                own[name].copy_(tensor)


class ClassifierModel(nn.Module):
    """`forward` gives the logits of a batch.

    Args:
        lm: a model of transformers without a head. Its parameters are frozen here, and it stays in
            evaluation mode.
        edits: in the order in which they act at one layer.
    """

    accepts_loss_kwargs = True
    # Nothing is kept of what lies below the lowest edit.
    lowest, depth, state_bytes = -1, 1, 0

    def __init__(self, lm: Any, edits: Sequence[Edit], head: ClassifierHead) -> None:
        super().__init__()
        self.lm = lm
        self.edits = tuple(edits)
        self.head = head
        # As the engine decides it: a generic tokenizer marks pairs for any model.
        self._typed = getattr(lm.config, "type_vocab_size", 0) > 1 and (
            "token_type_ids" in inspect.signature(lm.forward).parameters
        )
        self.interventions = nn.ModuleList(edit.module for edit in edits)
        lm.requires_grad_(False)
        self.hits = torch.zeros((), dtype=torch.long)
        self._batch: Batch | None = None
        layers = decoder_layers(lm)
        for number in sorted({edit.layer for edit in edits}):
            layers[number].register_forward_hook(partial(self._edit, number))
        self.train(True)

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        device: torch.device = self.lm.device
        return device

    def train(self, mode: bool = True) -> ClassifierModel:
        """Interventions and head train; the base never leaves evaluation mode."""
        super().train(mode)
        self.lm.eval()
        return self

    def can_pack(self, longest: int) -> bool:
        """False: an encoder's attention needs padded texts."""
        return False

    def forward(self, batch: LabelledBatch) -> Tensor:
        """Logits (B, C) in float32."""
        self._batch = batch
        lengths_B = torch.tensor(batch.lengths, device=self.device)
        mask_BT = torch.arange(batch.input_ids.shape[1], device=self.device) < lengths_B[:, None]
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": mask_BT.long()}
        if batch.token_types is not None and self._typed:
            inputs["token_type_ids"] = batch.token_types
        h_BTD: Tensor = self.lm(**inputs).last_hidden_state
        logits: Tensor = self.head(_read(h_BTD, mask_BT, lengths_B, self.head.plan.reads))
        return logits

    def _edit(self, layer: int, _module: nn.Module, _inputs: object, output: Any) -> Any:
        assert self._batch is not None
        h_BTD: Tensor = output[0] if isinstance(output, tuple) else output
        h_ND = h_BTD.flatten(0, 1)
        for edit in self.edits:
            if edit.layer == layer:
                h_ND = edit_rows(h_ND, self._batch.rows[edit.part], edit.module)
        edited = h_ND.view_as(h_BTD)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited


def _read(h_BTD: Tensor, mask_BT: Tensor, lengths_B: Tensor, reads: Read) -> Tensor:
    if reads == "first":
        return h_BTD[:, 0]
    if reads == "last":
        return h_BTD[torch.arange(len(h_BTD), device=h_BTD.device), lengths_B - 1]
    return (h_BTD * mask_BT[..., None]).sum(dim=1) / lengths_B[:, None]


def trunk_of(base: Path, facts: BaseFacts, dtype: torch.dtype) -> Any:
    """The base without any head, whole.

    Raises:
        BaseModelInvalid: it lacks tensors, which transformers would initialise at random.
    """
    lm, loading = AutoModel.from_pretrained(base, dtype=dtype, output_loading_info=True)
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise BaseModelInvalid(
            f"{facts.name} ({facts.architecture}) lacks {len(missing)} of its tensors, "
            f"{missing[0]} first"
        )
    return lm


def head_plan(base: Path, **given: Any) -> HeadPlan:
    """A head for a base: for an encoder RoBERTa's, a dense layer and a tanh on the first token; for
    a decoder one linear layer on the last token. `given` are values of the plan; None chooses the
    default.

    Raises:
        ClientError: a head of a decoder that does not read the last token.
    """
    encoder = AutoConfig.from_pretrained(base).model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not encoder and given.get("reads") not in (None, "last"):
        raise ClientError(
            f"the head cannot read the {given['reads']} of this base's tokens: in a decoder only "
            "the last token has seen the whole text"
        )
    chosen = {"reads": "first" if encoder else "last", "activation": "tanh" if encoder else None}
    return HeadPlan(
        **{**chosen, **{name: value for name, value in given.items() if value is not None}}
    )
