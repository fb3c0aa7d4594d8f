"""A tiny BERT and labelled rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sings",
    "barks",
    "sleeps",
    "good",
    "bad",
    "fine",
    "poor",
    "here",
    "there",
    "now",
]


def tiny_bert(folder: Path, heads: int = 2) -> Path:
    """A tiny random BERT with a word-piece tokenizer. vLLM's attention on CPUs needs 32 dimensions per head: one head."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab={word: k for k, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertModel(config)
    with (
        torch.no_grad()
    ):  # as wide as a trained one's: at its own scale tokens hardly see one another
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * 1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def rows_of(path: Path, label: Any, count: int = 96, pair: bool = False) -> Path:
    chance = random.Random(3)
    with path.open("w") as out:
        for _ in range(count):
            words = chance.choices(WORDS, k=5)
            row = {"text": " ".join(words), "label": label(words)}
            out.write(json.dumps(row | ({"text_pair": "the dog"} if pair else {})) + "\n")
    return path
