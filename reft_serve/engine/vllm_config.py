"""Facts of the engine's model and limits, read from vLLM's configuration."""

from __future__ import annotations

from collections.abc import Iterable

from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices

from reft_serve.adapters.engine_card import EngineCard
from reft_serve.adapters.manifest import BaseFacts, EngineLimits, InterventionSpec, place_of
from reft_serve.config import EngineSettings
from reft_serve.interventions.vocabulary import Component

__all__ = [
    "SETTINGS_KEY",
    "base_facts",
    "engine_card",
    "limits_of",
    "owner_of",
    "rank_faults",
    "settings_of",
    "share_of",
]

SETTINGS_KEY = "reft_serve"


def settings_of(config: VllmConfig) -> EngineSettings:
    """The engine's settings. They ride in `additional_config`, so that every process of the engine
    has the same ones and vLLM's compile cache, which hashes it, never mixes graphs of different
    settings.
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


def limits_of(config: VllmConfig) -> EngineLimits:
    """Size of the engine's pool."""
    settings = settings_of(config)
    lora = config.lora_config
    assert lora is not None
    components: set[Component] = set()
    if "block" in settings.components:
        components |= {"block_output", "block_input"}
    if "mlp_output" in settings.components:
        components.add("mlp_output")
    if "attention_output" in settings.components:
        components.add("attention_output")
    return EngineLimits(
        max_rank=settings.max_rank or lora.max_lora_rank,
        max_interventions=settings.max_interventions
        or 2 * config.model_config.hf_text_config.num_hidden_layers,
        components=frozenset(components),
    )


def engine_card(config: VllmConfig) -> EngineCard:
    """The engine's card, for engines with adapters."""
    assert config.lora_config is not None
    lora_rank = 0 if settings_of(config).lora == "off" else config.lora_config.max_lora_rank
    return EngineCard(base=base_facts(config), limits=limits_of(config), max_lora_rank=lora_rank)


def owner_of(spec: InterventionSpec) -> int:
    """The layer whose holder makes an edit. The stream that enters a layer is edited at the output
    of the previous one, which another rank of a pipeline may hold.
    """
    number, name = place_of(spec)
    return max(number - 1, 0) if name == "block" else number


def share_of(limits: EngineLimits, layers: int, of: int) -> int:
    """Number of interventions per adapter that a worker with `layers` of the model's layers
    supports.
    """
    assert limits.max_interventions is not None
    return -(-limits.max_interventions * layers // of)


def rank_faults(config: VllmConfig, specs: Iterable[InterventionSpec]) -> list[str]:
    """Faults of an adapter on this engine's pipeline only, whose ranks each have a share of the
    limits.
    """
    size = config.parallel_config.pipeline_parallel_size
    layers = config.model_config.hf_text_config.num_hidden_layers
    owners = [owner_of(spec) for spec in specs]
    limits = limits_of(config)
    faults = []
    for start, end in (get_pp_indices(layers, rank, size) for rank in range(size)):
        here = sum(start <= owner < end for owner in owners)
        most = share_of(limits, end - start, layers)
        if here > most:
            faults.append(
                f"{here} of its interventions are on one rank of the pipeline (layers {start} to "
                f"{end - 1}), which has room for {most}: raise REFT_MAX_INTERVENTIONS"
            )
    return faults
