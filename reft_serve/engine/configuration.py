"""Engine settings at start: removes vLLM's concessions to LoRA that ReFT alone does not need."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.lora.utils import get_adapter_absolute_path

from reft_serve.adapters.directory import is_adapter
from reft_serve.adapters.lora import holds_lora
from reft_serve.config import EngineSettings, read_settings
from reft_serve.engine.core.grammars import BACKEND
from reft_serve.engine.vllm_config import SETTINGS_KEY, settings_of
from reft_serve.errors import EngineUnsupported

__all__ = [
    "KNOWN_CONNECTORS",
    "check_modes",
    "wrap_check_and_update_config",
    "wrap_create_engine_config",
    "wrap_create_model",
    "wrap_from_cli_args",
]

# Stores of KV blocks outside the engine that are proven to keep adapters apart. One that finds
# blocks by their tokens alone would give one adapter's cache to another.
KNOWN_CONNECTORS: frozenset[str] = frozenset()


def wrap_from_cli_args(original: Any) -> Callable[[Any, argparse.Namespace], EngineArgs]:
    """Around `EngineArgs.from_cli_args`: note whether this server can get ReFT adapters only."""

    def from_cli_args(cls: Any, args: argparse.Namespace) -> EngineArgs:
        engine_args: EngineArgs = original(cls, args)
        modules = getattr(args, "lora_modules", None) or []
        more_may_come = (
            envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING or LoRAResolverRegistry.get_supported_resolvers()
        )
        paths = [Path(get_adapter_absolute_path(module.path)) for module in modules]
        only_reft = paths and all(is_adapter(path) and not holds_lora(path) for path in paths)
        engine_args.reft_only = bool(only_reft and not more_may_come)
        return engine_args

    return from_cli_args


def wrap_create_engine_config(original: Any) -> Callable[..., VllmConfig]:
    """Around `EngineArgs.create_engine_config`: decide the settings once; they travel in the
    configuration.
    """

    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        if self.enable_lora and SETTINGS_KEY not in self.additional_config:
            settings = read_settings(EngineSettings)
            if settings.lora == "auto" and getattr(self, "reft_only", False):
                settings = settings.model_copy(update={"lora": "off"})
            carried = settings.model_dump(mode="json") | {"components": sorted(settings.components)}
            self.additional_config = {**self.additional_config, SETTINGS_KEY: carried}
        config: VllmConfig = original(self, *args, **kwargs)
        if config.structured_outputs_config.backend == "auto":
            # vLLM would take the backend of the first request for all others; this one can be
            # bounded in every step.
            config.structured_outputs_config.backend = BACKEND
        if config.lora_config is not None:
            check_modes(config)
        return config

    return create_engine_config


def wrap_check_and_update_config(
    original: Callable[[Any, VllmConfig], None],
) -> Callable[[Any, VllmConfig], None]:
    """Around the CPU platform's `check_and_update_config`, which turns torch.compile off for LoRA's
    sake.
    """

    def check_and_update_config(cls: Any, config: VllmConfig) -> None:
        with _hidden_where_off(config):
            original(cls, config)

    return check_and_update_config


def wrap_create_model(original: Any) -> Callable[..., Any]:
    """Around `BaseModelLoader.create_model`, where experts choose kernels that take LoRAs: slower
    ones, and none on a CPU.
    """

    def create_model(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        with _hidden_where_off(vllm_config):
            return original(self, vllm_config, *args, **kwargs)

    return create_model


@contextmanager
def _hidden_where_off(config: VllmConfig) -> Iterator[None]:
    lora_config = config.lora_config
    if lora_config is not None and settings_of(config).lora == "off":
        config.lora_config = None
    try:
        yield
    finally:
        config.lora_config = lora_config


def check_modes(config: VllmConfig) -> None:
    """Refuse what is not correct yet.

    Raises:
        EngineUnsupported: with the mode and what to do instead.
    """
    parallel = config.parallel_config
    speculative = config.speculative_config
    backend = config.structured_outputs_config.backend
    connector = _connector(config)
    wrong = None
    if backend not in ("auto", BACKEND):
        wrong = (
            f"structured outputs by {backend}, whose work for one request cannot be bounded: "
            f"leave out the backend of --structured-outputs-config or choose {BACKEND}"
        )
    elif connector is not None and connector not in KNOWN_CONNECTORS:
        wrong = (
            f"the KV connector {connector} (it is not known to keep the caches of adapters "
            "apart): leave out --kv-transfer-config and --kv-offloading-size"
        )
    elif parallel.use_sequence_parallel_moe:
        wrong = (
            "sequence-parallel experts (a rank then holds only some of a step's rows): leave out "
            "--enable-expert-parallel"
        )
    elif parallel.prefill_context_parallel_size > 1:
        wrong = "prefill context parallelism: use tensor or pipeline parallelism"
    elif parallel.use_ubatching:
        wrong = "dual batch overlap: leave out --enable-dbo and --ubatch-size"
    elif speculative is not None and speculative.method != "ngram":
        wrong = f"speculative decoding by {speculative.method}: only ngram is tested"
    elif config.model_config.is_encoder_decoder:
        wrong = "an encoder-decoder model: ReFT edits decoder-only prompts"
    if wrong:
        raise EngineUnsupported(
            f"reft-serve does not serve {wrong}, or start without --enable-lora"
        )


def _connector(config: VllmConfig) -> str | None:
    """The name of the KV connector, with its module if it is not vLLM's own."""
    transfer = config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return None
    module = transfer.kv_connector_module_path
    return f"{module}.{transfer.kv_connector}" if module else str(transfer.kv_connector)
