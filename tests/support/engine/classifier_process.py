"""What `engine_process` runs for classifiers: one batch through one engine."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.engine.engine_process import _spare_inspection
from tests.support.engine.engines import running_engine

# A request: its adapter's directory or None for the base, its tokens, whether logits are wanted instead of scores, and where
# the second text of a pair begins, or None.
Asked = tuple[Path | None, Sequence[int], bool, int | None]


def classify_all(
    model: Path,
    asked: Sequence[Asked],
    options: Mapping[str, Any] | None = None,
    task: str = "classify",
) -> list[Tensor | str]:
    """The answers of one batch; a sentence in place of those that were refused."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    with suppress(KeyError):  # a class that vLLM makes of another
        _spare_inspection(model)
    defaults = {
        "max_loras": 16, "max_num_batched_tokens": 2048, "max_num_seqs": 32,
        "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True, "runner": "pooling", "max_model_len": 128,
        "enable_prefix_caching": None,
    }  # fmt: skip
    try:
        with running_engine(
            str(model), {"LORA": "off"}, **(defaults | dict(options or {}))
        ) as engine:
            return _answers(engine, asked, task)
    finally:
        cleanup_dist_env_and_memory()
        gc.collect()


def _answers(engine: Any, asked: Sequence[Asked], task: Any) -> list[Tensor | str]:
    from vllm import PoolingParams
    from vllm.lora.request import LoRARequest

    numbers = {path: n for n, path in enumerate(dict.fromkeys(path for path, *_ in asked), 1)}
    prompts = [{"prompt_token_ids": list(tokens)} for _, tokens, *_ in asked]
    params = [
        PoolingParams(
            use_activation=not logits,
            extra_kwargs=None if pair is None else {"compressed_token_type_ids": pair},
        )
        for _, _, logits, pair in asked
    ]
    loras = [
        None if path is None else LoRARequest(str(path), numbers[path], str(path))
        for path, *_ in asked
    ]

    def ask(chosen: slice) -> list[Any]:
        found: list[Any] = engine.encode(
            prompts[chosen],
            params[chosen],
            lora_request=loras[chosen],
            pooling_task=task,
            use_tqdm=False,
        )
        return found

    try:
        outputs = ask(slice(None))
    except Exception:
        outputs = []
        for k in range(len(asked)):
            try:
                outputs += ask(slice(k, k + 1))
            except Exception as exc:
                outputs.append(str(exc))
    return [
        each if isinstance(each, str) else torch.as_tensor(each.outputs.data).double()
        for each in outputs
    ]
