"""A frozen transformers model whose decoder layers are edited by interventions that learn.

Letters: B rows, T columns, D hidden width, N = B * T tokens, E edited tokens, Y tokens with a loss,
V vocabulary.

Work that no label depends on is left out: logits are computed for the Y tokens alone, and so are
the parts of the last layer that look at one token at a time, and that layer's edits. Nothing below
the lowest edited layer is recorded for the backward pass, since nothing there learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reft_serve.errors import BaseModelInvalid
from reft_serve.interventions.layers import attention_of, lists_of
from reft_serve.interventions.modules import Intervention
from reft_serve.interventions.positions import Part, PositionRule
from reft_serve.training.data.batching import Batch, collate
from reft_serve.training.data.examples import Example
from reft_serve.training.model import attention
from reft_serve.training.model.row_edit import edit_rows
from reft_serve.training.model.tail import leave_out

__all__ = ["Edit", "EditedModel", "decoder_layers"]

# Settings of a transformers config that keep attention from looking back over the whole example.
_WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """One intervention at the output of a decoder layer; `part` is the half of an untied rule that
    it serves.
    """

    layer: int
    part: Part
    module: Intervention


class EditedModel(nn.Module):
    """`forward` gives the log-probabilities of a batch's target tokens.

    Args:
        lm: a causal language model of transformers, PEFT's wrapper around one included. Its
            parameters are frozen here, LoRA's apart, and it stays in evaluation mode.
        edits: in the order in which they act at one layer.
        gradient_checkpointing: recompute each layer's activations in the backward pass.
        compiled: let torch.compile join the small operations of each layer but the last. What is
            between the layers stays as it is.
    """

    # transformers' Trainer then counts the targets of a whole optimiser step.
    accepts_loss_kwargs = True

    def __init__(
        self,
        lm: Any,
        edits: Sequence[Edit],
        *,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.edits = tuple(edits)
        self.interventions = nn.ModuleList(edit.module for edit in edits)
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_("lora_" in name)
        self._layers = decoder_layers(lm)
        self._batch: Batch | None = None
        self.hits = torch.zeros((), dtype=torch.long)
        self._live = True
        self._stopping = False
        self.depth = len(self._layers)
        self.lowest = min((edit.layer for edit in edits), default=len(self._layers) - 1)
        self._checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})
        # Not the last: it would be given the graph of the others, which lacks the hooks that leave
        # work out of it.
        for layer in self._layers[:-1] if compiled else ():
            # Its forward, and not the module, whose hooks edit what leaves it.
            layer.forward = torch.compile(layer.forward, dynamic=True)
        for layer in self._layers[: self.lowest + 1]:
            layer.forward = self._unless_known(layer.forward)
        for number in sorted({edit.layer for edit in edits}):
            self._layers[number].register_forward_hook(partial(self._edit, number))
        leave_out(self._layers[-1], self._targets)
        self._switch(True)

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        device: torch.device = self.lm.device
        return device

    @property
    def state_bytes(self) -> int:
        """Of one token's hidden state."""
        size: int = self.lm.config.get_text_config().hidden_size * self.lm.dtype.itemsize
        return size

    def train(self, mode: bool = True) -> EditedModel:
        """Interventions and LoRA train; the base never leaves evaluation mode."""
        if mode != self.training or self.lm.training:  # the Trainer says so before each micro-batch
            self._switch(mode)
        return self

    def _switch(self, mode: bool) -> None:
        super().train(mode)
        self.lm.eval()
        for name, module in self.lm.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        if self._checkpointing:
            for layer in self._layers:
                # transformers recomputes a layer only where this is set; its parts stay in
                # evaluation mode.
                layer.training = mode

    def forward(self, batch: Batch) -> Tensor:
        """Log-probabilities (Y,) in float32 of `batch.target_ids`; `hits` is then how many of these
        were the likeliest.
        """
        logprobs_Y, likeliest_Y = _chosen(self._logits(batch), batch.target_ids)
        self.hits = likeliest_Y.sum()
        return logprobs_Y

    @torch.no_grad()
    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `forward`, without gradients, and next to it whether each target was the likeliest
        token, bool (Y,).
        """
        return _chosen(self._logits(batch), batch.target_ids)

    @torch.no_grad()
    def base_score(self, batch: Batch) -> Tensor:
        """As `forward`, of the base model alone."""
        with getattr(self.lm, "disable_adapter", nullcontext)():
            return _chosen(self._logits(batch, edited=False), batch.target_ids)[0]

    @torch.no_grad()
    def frozen_states(self, batch: Batch) -> Tensor:
        """Hidden states at the lowest edited layer before its edit, (B, T, D). No layer above
        runs.
        """
        self._stopping = True
        try:
            self._logits(batch)
        except _Reached as reached:
            return reached.states
        finally:
            self._stopping = False
        raise AssertionError("the forward pass skipped the lowest edited layer")

    def can_pack(self, longest: int) -> bool:
        """True if packed batches give this model's exact results for examples of up to `longest`
        tokens; prepares the model for them.

        Asked of the model itself: two short examples must come out the same packed and one by one.
        """
        config = self.lm.config.get_text_config()
        windows = [getattr(config, name, None) for name in _WINDOWS]
        if config._attn_implementation != "sdpa" or any(
            window and window < longest for window in windows
        ):
            return False
        attention.install()
        apart = self._probe(packed=False)
        self.lm.set_attn_implementation(attention.PACKED)
        together = self._probe(packed=True)
        tolerance = 1e-3 if apart.dtype == torch.float32 and self.lm.dtype == torch.float32 else 0.1
        if (apart - together).abs().max() < tolerance:
            return True
        self.lm.set_attn_implementation("sdpa")
        return False

    def _probe(self, *, packed: bool) -> Tensor:
        vocabulary = self.lm.config.get_text_config().vocab_size
        tokens = [tuple(7 * i % vocabulary for i in range(3, 3 + n)) for n in (9, 4)]
        examples = [Example(ids, ids, len(ids)) for ids in tokens]
        batches = [examples] if packed else [[example] for example in examples]
        return torch.cat(
            [
                self.base_score(collate(batch, PositionRule("all"), packed=packed).to(self.device))
                for batch in batches
            ]
        )

    def _logits(self, batch: Batch, *, edited: bool = True) -> Tensor:
        # Kept until the next call: recomputing a layer in the backward pass asks for it again.
        self._batch = batch
        self._live = edited
        width = batch.input_ids.shape[1]
        if batch.packed:
            # The columns kept are the targets in their order: no copy, and no scattered sum in the
            # backward pass.
            kept = batch.target_rows
            extra = {
                "packed_lengths": torch.tensor(batch.lengths),
                "packed_targets": batch.target_rows,
            }
        else:
            kept, place_Y = torch.unique(batch.target_rows % width, return_inverse=True)
            extra = {}
        # No attention mask: padding is on the right, where no target looks.
        out = self.lm(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=kept,
            **extra,
        )
        logits_YV: Tensor = (
            out.logits[0] if batch.packed else out.logits[batch.target_rows // width, place_Y]
        )
        return logits_YV.float()

    def _targets(self) -> Tensor:
        assert self._batch is not None
        return self._batch.target_rows

    def _edit(self, layer: int, _module: nn.Module, _inputs: object, output: Any) -> Any:
        h_BTD: Tensor = output[0] if isinstance(output, tuple) else output
        if self._stopping:
            raise _Reached(h_BTD)
        if not self._live:
            return output
        h_ND = h_BTD.flatten(0, 1)
        for edit in self.edits:
            if edit.layer == layer:
                h_ND = edit_rows(h_ND, self._rows(edit), edit.module)
        edited = h_ND.view_as(h_BTD)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _unless_known(self, forward: Any) -> Any:
        """A layer's forward, which is left out where what leaves the lowest edited layer is
        known.
        """
        sort: list[type] = []

        @wraps(forward)
        def known(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            if self._batch is None or self._batch.states is None:
                output = forward(hidden_states, *args, **options)
                sort[:] = [type(output)]
                return output
            return (self._batch.states,) if sort == [tuple] else self._batch.states

        return known

    def _rows(self, edit: Edit) -> Tensor:
        assert self._batch is not None
        rows_E = self._batch.rows[edit.part]
        if edit.layer < len(self._layers) - 1:
            return rows_E
        # Above the last layer no token looks at another. Without rows the module still runs, and
        # its gradient is zero.
        return rows_E[torch.isin(rows_E, self._batch.target_rows)]


class _Reached(Exception):
    """Ends a forward pass that has come as far as it should."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _chosen(logits_YV: Tensor, ids_Y: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (Y,) of `ids_Y`, and whether each was the likeliest, bool (Y,)."""
    logprobs_Y = -cross_entropy(logits_YV, ids_Y, reduction="none")
    # The greatest value is found in one pass; `argmax` takes many times as long on a CPU.
    best_Y = logits_YV.detach().amax(1)
    return logprobs_Y, logits_YV.detach().gather(1, ids_Y.unsqueeze(1)).squeeze(1) == best_Y


def decoder_layers(lm: nn.Module) -> nn.ModuleList:
    """The layers of a model of transformers.

    Raises:
        BaseModelInvalid: it has no list of them with attention inside.
    """
    config: Any = lm.config
    count = config.get_text_config().num_hidden_layers
    for module in lists_of(lm, count):
        if all(attention_of(layer) is not None for layer in module):
            return module
    raise BaseModelInvalid(
        f"{type(lm).__name__} has no list of {count} decoder layers with attention inside, so it "
        "cannot be edited"
    )
