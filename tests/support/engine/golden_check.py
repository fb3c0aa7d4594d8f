"""What engines on any device are checked for: pyreft's golden answers, and idle decoding."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.engine.engines import import_saves, stats
from tests.support.paths import GOLDEN

# fp32: kernels differ in their order of summation. Seen at most 1.3e-5; the promise is 1e-3.
TOLERANCE = 1e-3
# Of the golden models, which have four layers: five boundaries of the stream, four attentions, four
# MLPs.
PLACES = 13

# By name: the golden vectors, and the imported adapter or None for the base model.
Cases = dict[str, tuple[Path, Path | None]]


def golden_cases(model: str, folder: Path, *, lora: bool = False) -> Cases:
    """The base and every save of a model that can be served, imported into `folder`; with `lora`,
    those that hold one too.
    """
    saves = import_saves(model, folder, lora=lora)
    adapters: Cases = {save.name: (save.vectors, path) for save, path in saves.items()}
    return {"base": (GOLDEN / "vectors" / model / "base.safetensors", None), **adapters}


def check_golden(engine: Any, cases: Cases) -> None:
    """All prompts of all cases in one mixed batch: first logprobs and greedy tokens as pyreft gives
    them.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = []
    for number, (name, (vectors, path)) in enumerate(cases.items()):
        logits = load_file(vectors)
        adapter = None if path is None else LoRARequest(name, number, str(path))
        for i, prompt in enumerate(json.loads(vectors.with_suffix(".json").read_text())["prompts"]):
            requests.append((f"{name}/{prompt['name']}", prompt, logits[f"logits/{i}"], adapter))
    random.Random(0).shuffle(requests)
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=5)
    outputs = engine.generate(
        [{"prompt_token_ids": prompt["token_ids"]} for _, prompt, _, _ in requests],
        params,
        lora_request=[adapter for _, _, _, adapter in requests],
        use_tqdm=False,
    )
    worst = 0.0
    for (name, prompt, logits_V, _), output in zip(requests, outputs, strict=True):
        (answer,) = output.outputs
        expected = torch.log_softmax(logits_V.double(), -1)
        first = answer.logprobs[0]
        worst = max(
            worst, *(abs(expected[token].item() - entry.logprob) for token, entry in first.items())
        )
        for step, (token, golden) in enumerate(
            zip(answer.token_ids, prompt["generated"], strict=True)
        ):
            if token != golden:
                assert prompt["gen_margin"][step] < 2 * TOLERANCE, (
                    f"{name}: token {step} is {token}, not {golden}"
                )
                break
    print(f"{len(requests)} prompts of {len(cases)} cases, largest logprob difference {worst:.2g}")
    assert worst < TOLERANCE


def decode_with_adapters(engine: Any, cases: Cases) -> dict[str, float]:
    """What the worker's counters grow by while adapters that edit prompts alone generate 40 tokens
    each.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = [
        LoRARequest(name, number, str(path))
        for number, (name, (_, path)) in enumerate(cases.items())
        if path is not None
        and json.loads((path / "reft_config.json").read_text())["positions"]["phase"] == "prompt"
    ]
    before = stats(engine)
    prompts = [{"prompt_token_ids": list(range(5 + i, 20 + i))} for i in range(len(adapters))]
    params = SamplingParams(temperature=0.0, max_tokens=40, min_tokens=40, ignore_eos=True)
    engine.generate(prompts, params, lora_request=adapters, use_tqdm=False)
    return {name: value - before[name] for name, value in stats(engine).items()}
