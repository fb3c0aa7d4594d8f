"""The plugin: where ReFT meets vLLM. Every seam that is replaced or wrapped is in this file.

vLLM's internals move, so the versions that were tested are named and others are refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import vllm

from reft_serve.engine.amx import permit_amx
from reft_serve.errors import EngineUnsupported

__all__ = ["KNOWN_VERSIONS", "register"]

KNOWN_VERSIONS = ("0.32.0",)

_registered = False


def register() -> None:
    """Make this process's vLLM serve ReFT adapters. vLLM calls it in every process; further calls do nothing.

    Raises:
        EngineUnsupported: a vLLM version that this plugin was not tested with.
    """
    global _registered
    if _registered:
        return
    check_version(vllm.__version__)
    _registered = True
    # vLLM's tags for tool calls are understood by xgrammar alone, and leave the arguments free; without them a forced call
    # follows the JSON schema of its tool. Parsers read this when they are imported.
    os.environ.setdefault("VLLM_ENFORCE_STRICT_TOOL_CALLING", "0")
    permit_amx()
    _patch_configuration()
    _patch_front_end()
    _patch_scheduler()
    _patch_workers()


def check_version(version: str) -> None:
    """Refuse a vLLM version that this plugin was not tested with."""
    if version.partition("+")[0] not in KNOWN_VERSIONS:
        raise EngineUnsupported(
            f"reft-serve knows vLLM {', '.join(KNOWN_VERSIONS)} and this is {version}: install a known version, or start "
            "without ReFT by VLLM_PLUGINS=''"
        )


def _wrap(owner: Any, name: str, around: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, wraps(original)(around(original)))


def _patch_configuration() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.cpu import CpuPlatform

    from reft_serve.engine import configuration

    _wrap(EngineArgs, "create_engine_config", configuration.with_settings)
    EngineArgs.from_cli_args = classmethod(configuration.noting_modules(EngineArgs.from_cli_args.__func__))
    CpuPlatform.check_and_update_config = staticmethod(
        configuration.keeping_compilation(CpuPlatform.check_and_update_config)
    )


def _patch_front_end() -> None:
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.instrumentator import health
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.structured_output import backend_guidance

    from reft_serve.engine import beams, front_end, grammar_checks, telemetry, usage

    # Constraints are checked by `grammar_checks`, in another process.
    backend_guidance.validate_guidance_grammar = lambda *_, **__: None
    _wrap(InputProcessor, "__init__", grammar_checks.starting_checks)
    _wrap(InputProcessor, "process_inputs", grammar_checks.checking_inputs)
    _wrap(AsyncLLM, "generate", grammar_checks.checking_first)
    _wrap(InputProcessor, "process_inputs", front_end.binding_inputs)
    for engine in (LLMEngine, AsyncLLM):
        for name in ("add_lora", "remove_lora", "pin_lora", "list_loras"):
            _wrap(engine, name, getattr(front_end, name))
    for searcher in (BeamSearchOfflineMixin, BeamSearchOnlineMixin):
        _wrap(searcher, "beam_search", beams.refusing_beams)
    _wrap(OpenAIServingModels, "load_lora_adapter", front_end.answering_faults)
    _wrap(OpenAIServingModels, "unload_lora_adapter", front_end.freeing_slots)
    _wrap(OpenAIServingModels, "show_available_models", front_end.telling_limits)
    _wrap(AsyncLLM, "_run_output_handler", telemetry.sampling_workers)
    _wrap(OutputProcessor, "_update_stats_from_finished", telemetry.counting_prefixes)
    _wrap(OutputProcessor, "_update_stats_from_finished", usage.noting_ends)
    _wrap(OutputProcessor, "abort_requests", usage.noting_aborts)
    for serving in (OpenAIServingChat, OpenAIServingCompletion):
        _wrap(serving, "__init__", usage.with_details)
    usage.add_route(health.router)


def _patch_scheduler() -> None:
    import vllm.v1.core.block_pool
    import vllm.v1.core.kv_cache_utils
    import vllm.v1.simple_kv_offload.manager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_guidance import GuidanceBackend

    from reft_serve.engine import admission, grammars, prefix_cache

    core = vllm.v1.core
    for module in (core.kv_cache_utils, core.block_pool, vllm.v1.simple_kv_offload.manager):
        _wrap(module, "generate_block_hash_extra_keys", prefix_cache.with_adapter_keys)
    _wrap(EngineCore, "preprocess_add_request", admission.reading_ahead)
    _wrap(EngineCore, "add_request", admission.admitting)
    _wrap(EngineCore, "add_lora", admission.adding)
    _wrap(EngineCore, "remove_lora", admission.removing)
    _wrap(EngineCore, "pin_lora", admission.pinning)
    EngineCore.reft_read_ahead = admission.read_ahead
    _wrap(Scheduler, "_free_request", admission.noting_finished)
    _wrap(StructuredOutputManager, "__init__", grammars.with_backend)
    _wrap(StructuredOutputManager, "grammar_bitmask", grammars.bounding_steps)
    _wrap(StructuredOutputManager, "accept_tokens", grammars.noting_exceeded)
    _wrap(GuidanceBackend, "compile_grammar", grammars.compiling_bounded)


def _patch_workers() -> None:
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
    from vllm.v1.worker.worker_base import WorkerBase

    from reft_serve.engine import configuration, loras, pipelines, runners, seeds

    _wrap(BaseModelLoader, "create_model", configuration.building_without_lora)
    for name in ("bgmv_expand", "bgmv_expand_slice"):
        _wrap(lora_ops, name, loras.sparing_base_rows)
        setattr(punica_cpu, name, getattr(lora_ops, name))
    _wrap(LoRAModelRunnerMixin, "load_lora_model", runners.with_manager)
    _wrap(LoRAModelRunnerMixin, "set_active_loras", runners.preparing_rows)
    _wrap(GPUModelRunner, "_determine_batch_execution_and_padding", runners.dispatching_by_rows)
    _wrap(GPUModelRunner, "sync_and_gather_intermediate_tensors", pipelines.making_buffers)
    _wrap(GPUModelRunner, "_sample", seeds.rewinding_generators)
    _wrap(GPUModelRunner, "_bookkeeping_sync", seeds.hiding_generators)
    WorkerBase.reft_counters = runners.reft_counters
    WorkerBase.reft_stats = runners.reft_stats
    WorkerBase.reft_hold = runners.reft_hold
    WorkerBase.reft_add = runners.reft_add
    WorkerBase.reft_release = runners.reft_release
