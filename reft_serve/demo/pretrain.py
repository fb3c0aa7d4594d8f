"""Pretrain a model of the demo model's shape: `python -m reft_serve.demo.pretrain STORIES OUT`.
About an hour on one core.

STORIES is a text file of JSON lines, each with a `text`; it is not part of this repository. The
recipe is that of the demo model: Muon for matrices, AdamW for embeddings and norms, a constant rate
for half of the steps and a linear decay after.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["main"]

_SEED = 0
_VOCABULARY = 2048
_CONTEXT = 1024
_WINDOW = 256
_BATCH = 16
_MUON_RATE = 2e-2
_ADAM_RATE = 3e-3
_WARM_UP = 50
_FLOOR = 0.02
_END = "<|endoftext|>"
_PAD = "<|pad|>"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pretrain a small Llama on short stories.")
    parser.add_argument("stories", type=Path, help="JSON lines, each with a text")
    parser.add_argument("out", type=Path, help="directory to write the model and its tokenizer to")
    parser.add_argument(
        "--steps", type=int, default=3700, help=f"of {_BATCH} windows of {_WINDOW} tokens each"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args(argv)
    torch.manual_seed(_SEED)
    torch.set_num_threads(arguments.threads)
    console = Console()
    texts = [json.loads(line)["text"] for line in arguments.stories.read_text().splitlines()]
    random.Random(_SEED).shuffle(texts)  # noqa: S311 - not a secret
    held_out = max(1, min(600, len(texts) // 20))
    tokenizer = _tokenizer(texts[held_out:])
    tokens, unseen = (_tokens(tokenizer, part) for part in (texts[held_out:], texts[:held_out]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm: Any = LlamaForCausalLM(_shape()).to(device)
    console.print(
        f"{sum(p.numel() for p in lm.parameters()):,} parameters, {len(tokens):,} tokens, on "
        f"{device}"
    )
    for step, loss in enumerate(_train(lm, tokens, arguments.steps), 1):
        if step % 100 == 0:
            console.print(f"step {step}: loss {loss:.3f}")
    console.print(f"held-out loss {_evaluate(lm, unseen):.3f} per token")
    lm.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


def _tokenizer(texts: list[str]) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=[_END, _PAD], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{_END} $A", special_tokens=[(_END, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=_END,
        eos_token=_END,
        pad_token=_PAD,
        model_max_length=_CONTEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _tokens(tokenizer: Any, texts: list[str]) -> Tensor:
    """The stories as one row of tokens, each after a token that ends the one before it."""
    return torch.tensor([token for ids in tokenizer(texts).input_ids for token in ids] + [0])


def _shape() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=_CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def _train(lm: Any, tokens: Tensor, steps: int) -> Iterator[float]:
    """Train, yielding each step's loss."""
    embeddings = lm.get_input_embeddings().weight
    matrices = [p for p in lm.parameters() if p.ndim == 2 and p is not embeddings]
    norms = [p for p in lm.parameters() if p.ndim == 1]
    groups = [
        {"params": [embeddings], "weight_decay": 0.01},
        {"params": norms, "weight_decay": 0.0},
    ]
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.Muon(matrices, lr=_MUON_RATE, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(groups, lr=_ADAM_RATE, betas=(0.9, 0.95)),
    )

    def share(step: int) -> float:
        decay = 1.0 if step < steps / 2 else max(_FLOOR, 2 * (1 - step / steps))
        return min(1.0, (step + 1) / _WARM_UP) * decay

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    windows = _windows(tokens)
    lm.train()
    for _ in range(steps):
        loss = _loss(lm, next(windows))
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        yield loss.item()


def _windows(tokens: Tensor) -> Iterator[Tensor]:
    """Batches (B, window + 1) without end; every pass over the stories is cut at another offset."""
    while True:
        offset = int(torch.randint(_WINDOW, ()))
        starts = torch.arange(offset, len(tokens) - _WINDOW, _WINDOW)
        starts = starts[torch.randperm(len(starts))]
        for chosen in torch.split(starts, _BATCH):
            yield tokens[chosen[:, None] + torch.arange(_WINDOW + 1)]


def _loss(lm: Any, tokens_BT: Tensor) -> Tensor:
    tokens_BT = tokens_BT.to(lm.device)
    with torch.autocast(lm.device.type, dtype=torch.bfloat16):
        logits_BTV = lm(input_ids=tokens_BT[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT[:, 1:].flatten())


@torch.inference_mode()
def _evaluate(lm: Any, tokens: Tensor) -> float:
    lm.eval()
    starts = torch.arange(0, len(tokens) - _WINDOW, _WINDOW)
    batches = [
        tokens[chosen[:, None] + torch.arange(_WINDOW + 1)]
        for chosen in torch.split(starts, _BATCH)
    ]
    return sum(_loss(lm, batch).item() * len(batch) for batch in batches) / len(starts)


if __name__ == "__main__":
    main()
