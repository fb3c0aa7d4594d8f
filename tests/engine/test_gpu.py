"""On a GPU, through vLLM's V2 runner: Triton kernel, torch.compile and CUDA graphs, against the
same golden answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engine.bfloat16_check import check_bfloat16
from tests.support.engine.engines import running_engine
from tests.support.engine.golden_check import (
    PLACES,
    Cases,
    check_golden,
    decode_with_adapters,
    golden_cases,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"
    ),
]

# In chunks of 17 a prompt has steps that edit nothing, which replay graphs that hold our launches.
ARMS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "graphs": ({"LORA": "off"}, {"enforce_eager": False}),
    "graphs, LoRA machinery on, chunks of 17": (
        {"LORA": "on"},
        {"enforce_eager": False, "max_num_batched_tokens": 17, "max_num_seqs": 17},
    ),
    "eager": ({"LORA": "off"}, {}),
}


@pytest.fixture(scope="module", params=ARMS)
def arm(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Cases]]:
    settings, options = ARMS[request.param]
    cases = golden_cases("tiny-llama", tmp_path_factory.mktemp("adapters"))
    with running_engine("tiny-llama", settings, core_process=True, **options) as engine:
        yield engine, cases


def test_a_mixed_batch_gives_what_pyreft_gives(arm: tuple[Any, Cases]) -> None:
    check_golden(*arm)


def test_decode_steps_run_no_op_body(arm: tuple[Any, Cases]) -> None:
    spent = decode_with_adapters(*arm)
    assert spent["steps"] >= spent["steps_with_rows"] + 39
    if arm[0].llm_engine.vllm_config.model_config.enforce_eager:
        assert 0 < spent["op_bodies"] == spent["steps_with_rows"] * PLACES
    else:  # a replayed graph runs its launches without the host's op
        assert spent["op_bodies"] <= spent["steps_with_rows"] * PLACES


def test_graphs_give_what_eager_steps_give(tmp_path: Path) -> None:
    cases = golden_cases("tiny-llama", tmp_path)
    answers = []
    for eager in (True, False):
        with running_engine(
            "tiny-llama", {"LORA": "off"}, core_process=True, enforce_eager=eager
        ) as engine:
            answers.append(first_logprobs(engine, cases))
    assert len(answers[0]) == len(cases)
    for graphs, eager in zip(*answers, strict=True):
        assert graphs == pytest.approx(eager, abs=1e-4)


def test_bfloat16_is_as_close_to_the_exact_answer_as_pyreft_is(tmp_path: Path) -> None:
    check_bfloat16(tmp_path, core_process=True, enforce_eager=False)


def first_logprobs(engine: Any, cases: Cases) -> list[dict[int, float]]:
    """The base's and each adapter's most likely first tokens after a prompt that is longer than its
    edits.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = [
        None if path is None else LoRARequest(name, number, str(path))
        for number, (name, (_, path)) in enumerate(cases.items())
    ]
    outputs = engine.generate(
        [{"prompt_token_ids": list(range(5, 45))}] * len(adapters),
        SamplingParams(temperature=0.0, max_tokens=1, logprobs=5),
        lora_request=adapters,
        use_tqdm=False,
    )
    return [
        {token: p.logprob for token, p in out.outputs[0].logprobs[0].items()} for out in outputs
    ]
