"""A LoRA of PEFT trained in one run with the interventions, and saved next to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from reft_serve.adapters.lora import Lora, lora_of_tensors
from reft_serve.errors import ClientError
from reft_serve.training.plan import LoraPlan

__all__ = ["attach", "lora_weights", "wrap"]


def wrap(lm: Any, plan: LoraPlan) -> Any:
    """PEFT's model around `lm`, with a fresh LoRA that changes nothing yet.

    Raises:
        ClientError: there are no such linear layers.
    """
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        lora_dropout=plan.dropout,
        target_modules=None if plan.targets is None else list(plan.targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(lm, config)
    except ValueError as exc:
        raise ClientError(f"the LoRA cannot be added to the base model: {str(exc)[:400]}") from exc


def attach(lm: Any, path: Path, *, trained: bool = False) -> Any:
    """PEFT's model around `lm`, with the LoRA in an adapter's directory, to be trained on or as it
    is.
    """
    return PeftModel.from_pretrained(lm, str(path), is_trainable=trained)


def lora_weights(lm: Any, where: str) -> Lora:
    """The LoRA as it is now, in PEFT's two files."""
    config = lm.peft_config["default"].to_dict() | {"inference_mode": True}
    plain = {
        name: sorted(value) if isinstance(value, set) else value for name, value in config.items()
    }
    tensors = {
        name: tensor.detach().cpu().clone()
        for name, tensor in get_peft_model_state_dict(lm).items()
    }
    return lora_of_tensors(plain, tensors, lm.config.get_text_config().num_hidden_layers, where)
