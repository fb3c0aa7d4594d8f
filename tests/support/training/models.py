"""Edited models, examples for them, and what one step learns."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from reft_serve.interventions.modules import Intervention
from reft_serve.interventions.positions import Part, PositionRule
from reft_serve.training.data.batching import Batch
from reft_serve.training.data.examples import Example
from reft_serve.training.model.edited_model import Edit, EditedModel
from tests.support.training.runs import examples

RULE = PositionRule("f3+l3")


def edited(folder: Path, lowest: int) -> EditedModel:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = lm.config.get_text_config()
    layers = range(lowest, config.num_hidden_layers)
    return EditedModel(
        lm, [Edit(k, Part.PREFIX, Intervention("loreft", config.hidden_size, 3)) for k in layers]
    )


def examples_of(model: EditedModel, count: int) -> list[Example]:
    vocabulary = model.lm.config.get_text_config().vocab_size
    all_ids = [tuple(i % vocabulary for i in each.input_ids) for each in examples(count)]
    return [Example(ids, ids, len(ids) // 2 + 1) for ids in all_ids]


def learnt(model: EditedModel, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities of the targets, and what a weighted sum of them gives as gradients of the
    interventions.
    """
    model.zero_grad()
    logprobs = model(batch)
    (logprobs * torch.linspace(0.5, 1, len(logprobs))).sum().backward()
    return logprobs.detach(), [
        p.grad.clone() for p in model.interventions.parameters() if p.grad is not None
    ]
