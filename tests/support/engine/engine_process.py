"""Many tiny engines, one after another, in one process of their own: each then starts in seconds, not half a minute.

The Hugging Face models that they are compared with stay in the test's process, since vLLM changes transformers' classes in
the one that it runs in.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.engine.engines import running_engine
from tests.support.engine.family_models import TinyAdapter

# A request: its adapter, or None for the base, and its prompt.
Asked = tuple[TinyAdapter | None, list[int]]
# The tokens generated and log-probabilities (tokens, vocabulary) as `family_models.reference_logprobs` has them, the last
# rows of it where prompt logprobs were not asked for.
Answer = tuple[list[int], Tensor]


@contextmanager
def engine_process() -> Iterator[Executor]:
    """A process for `answer_in_rounds`."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield process


def answer_in_rounds(
    model: Path, settings: dict[str, str], asked: Sequence[Asked], options: Mapping[str, Any]
) -> list[list[Answer]]:
    """All requests in one batch, three times: with prompt logprobs, which bypass the prefix cache; into it; out of it."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    _spare_inspection(model)
    defaults = {
        "max_loras": 8, "max_logprobs": -1, "skip_tokenizer_init": True, "max_num_batched_tokens": 64, "max_num_seqs": 32,
        "kv_cache_memory_bytes": 64 << 20,
    }  # fmt: skip
    try:
        with running_engine(str(model), settings, **(defaults | dict(options))) as engine:
            return [_answers(engine, asked, with_prompts) for with_prompts in (True, False, False)]
    finally:
        cleanup_dist_env_and_memory()
        gc.collect()


def _spare_inspection(model: Path) -> None:
    """Register the model's class by itself: vLLM would first import it in yet another process, for ten seconds."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    for architecture in AutoConfig.from_pretrained(model).architectures:
        ModelRegistry.register_model(
            architecture, ModelRegistry.models[architecture].load_model_cls()
        )


def _answers(engine: Any, asked: Sequence[Asked], with_prompts: bool) -> list[Answer]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(
        temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=-1, prompt_logprobs=-1 if with_prompts else None,
        detokenize=False,
    )  # fmt: skip
    numbers = {adapter.name: n for n, (adapter, _) in enumerate(asked, 1) if adapter is not None}
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for _, prompt in asked],
        params,
        lora_request=[
            None if a is None else LoRARequest(a.name, numbers[a.name], str(a.path))
            for a, _ in asked
        ],
        use_tqdm=False,
    )
    answers = []
    for output in outputs:
        steps = [*(output.prompt_logprobs or [])[1:], *output.outputs[0].logprobs]
        rows = [[step[token].logprob for token in sorted(step)] for step in steps]
        answers.append((list(output.outputs[0].token_ids), torch.tensor(rows, dtype=torch.float64)))
    return answers
