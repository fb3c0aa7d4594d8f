"""Real engines for tests: started once per module, stopped at its end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from reft_serve.adapters.importers.detection import import_adapter
from tests.support.adapters.saves import IMPORTABLE, Save
from tests.support.paths import GOLDEN


@contextmanager
def running_engine(
    model: str,
    settings: dict[str, str] | None = None,
    *,
    core_process: Any = False,
    **options: Any,
) -> Iterator[Any]:
    """A vLLM engine of a golden model with adapters on.

    Each further process of an engine takes ten seconds to import vLLM, and a compiled model up to a
    minute: by default the engine computes in this process, and without a compiler.

    Args:
        model: a model of the golden folder, or the path of one.
        settings: REFT_* variables without the prefix.
        core_process: the engine core and the worker get a process each, as in a deployment.
        options: of vLLM's `LLM`.
    """
    from vllm import LLM

    defaults: dict[str, Any] = {
        "dtype": "float32", "enable_lora": True, "max_loras": 64, "max_lora_rank": 16, "max_model_len": 128,
        "max_num_batched_tokens": 2048, "max_num_seqs": 256, "block_size": 32, "enable_prefix_caching": True,
        "kv_cache_memory_bytes": 256 << 20, "disable_log_stats": True, "enforce_eager": True,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (settings or {}).items():
            patch.setenv(f"REFT_{name}", value)
        if not core_process:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            patch.setenv(
                "VLLM_CPU_OMP_THREADS_BIND", "nobind"
            )  # else this process is bound to a core
            patch.setattr(torch, "set_num_threads", torch.set_num_threads)  # the worker replaces it
            # Engines collect garbage often, and each time would look at all modules for a second.
            gc.freeze()
        engine = LLM(str(GOLDEN / "models" / model), **(defaults | options))
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()


def import_saves(
    model: str, folder: Path, dtype: str = "float32", *, lora: bool = False
) -> dict[Save, Path]:
    """Every golden save of a model that can be served, imported into `folder`; with `lora`, those that hold one too."""
    saves = [
        s
        for s in IMPORTABLE
        if s.name.startswith(model) and ("bf16" in s.name) == (dtype == "bfloat16")
    ]
    saves = [s for s in saves if lora or s.flags.lora_alpha is None]
    for save in saves:
        import_adapter(save.path, save.base, folder / save.name, save.flags)
    return {save: folder / save.name for save in saves}


def stats(engine: Any) -> dict[str, float]:
    """The first worker's counters."""
    counters: dict[str, float] = engine.collective_rpc("reft_stats")[0]
    return counters


def engine_config(**options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    model = str(GOLDEN / "models" / "tiny-llama")
    return EngineArgs(
        model=model, enable_lora=True, max_model_len=64, **options
    ).create_engine_config()
