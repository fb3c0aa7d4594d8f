"""Every golden case that an engine can express, through the engine, all adapters of a model in one
mixed batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.engine.engines import running_engine, stats
from tests.support.engine.golden_check import (
    PLACES,
    Cases,
    check_golden,
    decode_with_adapters,
    golden_cases,
)

ARMS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "llama, LoRA machinery on, chunks of 17": (
        "tiny-llama",
        {},
        {"max_num_batched_tokens": 17, "max_num_seqs": 17},
    ),
    "llama, ReFT only, compiled": ("tiny-llama", {"LORA": "off"}, {"enforce_eager": False}),
    "gpt2, chunks of 17": ("tiny-gpt2", {}, {"max_num_batched_tokens": 17, "max_num_seqs": 17}),
}


@pytest.fixture(scope="module", params=ARMS)
def arm(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Cases]]:
    model, settings, options = ARMS[request.param]
    cases = golden_cases(model, tmp_path_factory.mktemp("adapters"), lora="LORA" not in settings)
    with running_engine(model, settings, **options) as engine:
        yield engine, cases


def test_a_mixed_batch_gives_what_pyreft_gives(arm: tuple[Any, Cases]) -> None:
    check_golden(*arm)


def test_a_step_without_edited_tokens_does_no_work(arm: tuple[Any, Cases]) -> None:
    spent = decode_with_adapters(*arm)
    assert spent["steps"] >= spent["steps_with_rows"] + 39
    assert 0 < spent["op_bodies"] == spent["steps_with_rows"] * PLACES


def test_rows_cost_the_host_next_to_nothing_while_decoding(arm: tuple[Any, Cases]) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine, cases = arm
    number, name = next((n, name) for n, name in enumerate(cases) if name.endswith("loreft_f5l5"))
    seqs = engine.llm_engine.vllm_config.scheduler_config.max_num_seqs
    params = SamplingParams(
        temperature=0.0, max_tokens=24, min_tokens=24, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": [3 + i % 200, 5, 7, 9]} for i in range(seqs)]
    adapter = LoRARequest(name, number, str(cases[name][1]))
    # A median of the last 256 steps. Where others had the core meanwhile, go on until they are all
    # new ones.
    for _ in range(12):
        engine.generate(prompts, params, lora_request=[adapter] * seqs, use_tqdm=False)
        spent = stats(engine)["decode_row_seconds_median"]
        if spent < 100e-6:
            break
    print(f"{seqs} requests: {spent * 1e6:.0f} us per step")
    assert spent < 100e-6
