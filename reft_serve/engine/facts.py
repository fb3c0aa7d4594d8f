"""What an engine runs and takes, read from vLLM's configuration."""

from __future__ import annotations

from vllm.config import VllmConfig

from reft_serve.adapters.manifest import BaseFacts, Limits
from reft_serve.config import EngineSettings
from reft_serve.interventions.vocabulary import Component

__all__ = ["SETTINGS_KEY", "base_facts", "limits_of", "settings_of"]

SETTINGS_KEY = "reft_serve"


def settings_of(config: VllmConfig) -> EngineSettings:
    """The engine's settings. They ride in `additional_config`, so that every process of the engine has the same ones and
    vLLM's compile cache, which hashes it, never mixes graphs of different settings.
    """
    carried = dict(config.additional_config[SETTINGS_KEY])
    return EngineSettings(**{**carried, "components": frozenset(carried["components"])})


def base_facts(config: VllmConfig) -> BaseFacts:
    """The base model's facts, as an adapter's manifest states them."""
    model = config.model_config
    return BaseFacts(
        name=str(model.model),
        architecture=(model.hf_config.architectures or ["unknown"])[0],
        hidden_size=model.get_hidden_size(),
        num_hidden_layers=model.hf_text_config.num_hidden_layers,
    )


def limits_of(config: VllmConfig) -> Limits:
    """What the engine's pool is sized for."""
    settings, lora = settings_of(config), config.lora_config
    assert lora is not None
    components: set[Component] = set()
    if "block" in settings.components:
        components |= {"block_output", "block_input"}
    if "mlp_output" in settings.components:
        components.add("mlp_output")
    if "attention_output" in settings.components:
        components.add("attention_output")
    return Limits(
        max_rank=settings.max_rank or lora.max_lora_rank,
        max_interventions=settings.max_interventions or 2 * config.model_config.hf_text_config.num_hidden_layers,
        components=frozenset(components),
    )
