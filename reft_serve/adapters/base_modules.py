"""The linear modules of a base model, which its LoRAs are compared with. Needs transformers, and
loads no weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reft_serve.errors import BaseModelInvalid

__all__ = ["Shape", "linear_modules"]

Shape = tuple[int, int]
_PREFIXES = ("model.", "model.language_model.", "language_model.", "language_model.model.")


def linear_modules(base: Path) -> Mapping[str, Shape]:
    """(inputs, outputs) of each linear module of a base model, by its path.

    Args:
        base: the model's local directory.

    Raises:
        BaseModelInvalid: transformers cannot build the model, or is not installed.
    """
    try:
        import transformers
    except ImportError as exc:
        raise BaseModelInvalid(
            "checking a LoRA against its base model needs transformers, which is not installed"
        ) from exc
    try:
        config = transformers.AutoConfig.from_pretrained(base)
        architecture = getattr(
            transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM
        )
        with torch.device("meta"):
            build: Any = getattr(architecture, "_from_config", None) or architecture.from_config
            model = build(config)
    except Exception as exc:  # whatever a configuration makes of it, it is the base's
        raise BaseModelInvalid(
            f"the modules of the base model at {base} cannot be listed: {str(exc)[:200]}"
        ) from exc
    shapes = dict(_linear(model))
    # PEFT's names of such models differ between releases of transformers
    if config.get_text_config() is not config:
        shapes |= {name: shape for path, shape in shapes.items() for name in _other_names(path)}
    return shapes


def _other_names(path: str) -> Iterator[str]:
    """The names that the language model's modules have had in models of several parts."""
    _, separator, tail = path.partition("language_model.")
    if separator:
        tail = tail.removeprefix("model.")
        yield from (f"{prefix}{tail}" for prefix in _PREFIXES)


def _linear(model: nn.Module) -> Iterator[tuple[str, Shape]]:
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            yield path, (module.in_features, module.out_features)
        elif (
            type(module).__name__ == "Conv1D"
            and isinstance(weight, torch.Tensor)
            and weight.ndim == 2
        ):
            yield path, (weight.shape[0], weight.shape[1])  # GPT-2's, whose weights are transposed
