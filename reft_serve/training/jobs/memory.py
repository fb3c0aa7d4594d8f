"""Memory estimate of a job, from the base model's files before anything is loaded. No torch.

An upper estimate: it decides how many jobs run next to each other, and a job that is refused for it
waits for nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reft_serve.recipes.hyperparameters import DpoHyperparameters
from reft_serve.training.defaults import MICRO_TOKENS, most_tokens
from reft_serve.training.plan import Plan, much_is_below

__all__ = ["context_of", "estimate"]

_PROCESS = 700 << 20
_CUDA = 900 << 20
_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


def estimate(base: Path, asked: DpoHyperparameters, *, gpu: bool) -> int:
    """Bytes at the peak: the frozen base, what its forward pass keeps for the backward one, logits,
    and the process; on a CPU also what the run may keep from one epoch to the next.

    Raises:
        OSError, ValueError: the model's `config.json` or weights cannot be read.
    """
    config = _config(base)
    stored = sum(
        file.stat().st_size for file in base.iterdir() if file.suffix in (".safetensors", ".bin")
    )
    parameters = stored // _WIDTHS.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
    width = 2 if gpu else 4
    longest = most_tokens(asked, context_of(base))
    tokens = max(MICRO_TOKENS, longest)
    if asked.batch_size != "auto" and asked.accumulation != "auto":
        tokens = -(-asked.batch_size // asked.accumulation) * longest
    hidden = int(config.get("hidden_size") or 1)
    layers = int(config.get("num_hidden_layers") or 1)
    inner = int(config.get("intermediate_size") or 4 * hidden)
    kept = tokens * layers * (10 * hidden + 4 * inner) * width
    # Answers are a part of the tokens; a quarter of them is more than chats have.
    logits = tokens // 4 * int(config.get("vocab_size") or 1) * (width + 8)
    lowest = min(asked.layers) if isinstance(asked.layers, list) else 0
    states = int(Plan().keep_states * 2**30) if not gpu and much_is_below(lowest, layers) else 0
    return parameters * width + kept + logits + states + (_CUDA if gpu else _PROCESS)


def context_of(base: Path) -> int | None:
    """Tokens of the model's context, if its configuration has them."""
    length = _config(base).get("max_position_embeddings") or _config(base).get("n_positions")
    return length if isinstance(length, int) and length > 0 else None


def _config(base: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    nested = read.get("text_config")
    return {**read, **nested} if isinstance(nested, dict) else read
