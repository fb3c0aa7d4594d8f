"""Every golden case that an engine can express, through the engine, all adapters of a model in one mixed batch."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import GOLDEN
from tests.engine.engines import import_saves, running_engine, stats

# fp32: kernels differ in their order of summation. Seen at most 1.3e-5; the promise is 1e-3.
TOLERANCE = 1e-3

ARMS = {
    "llama, LoRA machinery on, chunks of 17": ("tiny-llama", {}, {"max_num_batched_tokens": 17, "max_num_seqs": 17}),
    "llama, ReFT only, compiled": ("tiny-llama", {"LORA": "off"}, {}),
    "gpt2, chunks of 17": ("tiny-gpt2", {}, {"max_num_batched_tokens": 17, "max_num_seqs": 17}),
}


@pytest.fixture(scope="module", params=ARMS)
def arm(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, Any]]]:
    model, settings, options = ARMS[request.param]
    paths = {s.name: (s.vectors, p) for s, p in import_saves(model, tmp_path_factory.mktemp("adapters")).items()}
    cases = {"base": (GOLDEN / "vectors" / model / "base.safetensors", None), **paths}
    with running_engine(model, settings, **options) as engine:
        yield engine, cases


def test_a_mixed_batch_gives_what_pyreft_gives(arm: tuple[Any, dict[str, Any]]) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine, cases = arm
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
    for (name, prompt, logits, _), output in zip(requests, outputs, strict=True):
        (answer,) = output.outputs
        expected = torch.log_softmax(logits.double(), -1)
        first = answer.logprobs[0]
        worst = max(worst, *(abs(expected[token].item() - entry.logprob) for token, entry in first.items()))
        for step, (token, golden) in enumerate(zip(answer.token_ids, prompt["generated"], strict=True)):
            if token != golden:
                assert prompt["gen_margin"][step] < 2 * TOLERANCE, f"{name}: token {step} is {token}, not {golden}"
                break
    print(f"{len(requests)} prompts of {len(cases)} cases, largest logprob difference {worst:.2g}")
    assert worst < TOLERANCE


def test_a_step_without_edited_tokens_does_no_work(arm: tuple[Any, dict[str, Any]]) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine, cases = arm
    adapters = [
        LoRARequest(name, number, str(path))
        for number, (name, (_, path)) in enumerate(cases.items())
        if path is not None and json.loads((path / "reft_config.json").read_text())["positions"]["phase"] == "prompt"
    ]
    before = stats(engine)
    prompts = [{"prompt_token_ids": list(range(5 + i, 20 + i))} for i in range(len(adapters))]
    params = SamplingParams(temperature=0.0, max_tokens=40, min_tokens=40, ignore_eos=True)
    engine.generate(prompts, params, lora_request=adapters, use_tqdm=False)
    spent = {name: value - before[name] for name, value in stats(engine).items()}
    places = 13  # four layers: five boundaries of the stream, four attentions, four MLPs
    assert spent["steps"] >= spent["steps_with_rows"] + 39
    assert 0 < spent["op_bodies"] == spent["steps_with_rows"] * places


def test_rows_cost_the_host_next_to_nothing_while_decoding(arm: tuple[Any, dict[str, Any]]) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine, cases = arm
    number, name = next((n, name) for n, name in enumerate(cases) if name.endswith("loreft_f5l5"))
    seqs = engine.llm_engine.vllm_config.scheduler_config.max_num_seqs
    params = SamplingParams(temperature=0.0, max_tokens=24, min_tokens=24, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [3 + i % 200, 5, 7, 9]} for i in range(seqs)]
    adapter = LoRARequest(name, number, str(cases[name][1]))
    engine.generate(prompts, params, lora_request=[adapter] * seqs, use_tqdm=False)
    spent = stats(engine)["decode_row_seconds_median"]
    print(f"{seqs} requests: {spent * 1e6:.0f} us per step")
    assert spent < 100e-6
