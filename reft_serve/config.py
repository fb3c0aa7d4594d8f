"""Settings, each readable from a `REFT_*` environment variable. The only module that reads the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

__all__ = ["EngineSettings", "ServeSettings", "child_environment"]


class EngineSettings(BaseSettings):
    """What an engine process may hold. Read once, when the engine starts."""

    model_config = SettingsConfigDict(env_prefix="REFT_", frozen=True, extra="ignore")

    lora: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="LoRA beside ReFT. auto: on where the model supports it. off: a ReFT-only engine, which wraps no "
        "linear layer, allocates no LoRA buffer and keeps torch.compile on CPU.",
    )
    max_rank: int | None = Field(
        default=None, ge=1, le=1024, description="Largest rank of an intervention; default: vLLM's --max-lora-rank."
    )
    max_interventions: int | None = Field(
        default=None, ge=1, description="Largest number of interventions of one adapter; default: 2 per layer."
    )
    components: frozenset[Literal["block", "mlp_output", "attention_output"]] = Field(
        default=frozenset({"block", "mlp_output", "attention_output"}),
        description="Places that can be edited, as a JSON list. Each one left out saves an op per layer and step on CPU.",
    )
    max_adapter_bytes: int = Field(
        default=2**30, ge=1, description="Largest size in bytes of an adapter's tensor file."
    )
    home: Path = Field(
        default=Path("~/.cache/reft-serve"), description="Where adapters converted on the fly by `serve` are kept."
    )


class ServeSettings(BaseSettings):
    """What `reft-serve serve` must know of vLLM's own environment before it starts vLLM."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    vllm_plugins: str | None = Field(default=None, description="Plugins that vLLM loads; all where it is not set.")
    vllm_allow_runtime_lora_updating: str | None = Field(
        default=None, description="1 or true: adapters can be loaded over HTTP, LoRAs among them."
    )
    vllm_cpu_kvcache_space: str | None = Field(default=None, description="GiB of KV cache on a machine without a GPU.")


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `changes`, for a process that it starts or becomes."""
    return {**os.environ, **changes}
