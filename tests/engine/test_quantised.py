"""Over a quantised base, edits act on the stream as its layers give it, and add no error of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.engine.engine_process import answer_in_rounds, engine_process
from tests.support.engine.family_models import (
    EFFECT,
    FAMILIES,
    PROMPTS,
    make_adapters,
    reference_logprobs,
)
from tests.support.engine.quantised_models import SCHEMES

# GPU kernels for 4 bits want inner widths that are multiples of 128.
LLAMA = replace(FAMILIES["llama"], options={**FAMILIES["llama"].options, "intermediate_size": 256})
# How far a 16-bit engine may be from the exact answer, as a multiple of what plain torch is off in the same dtype.
ALLOWANCE = 1.5

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"
)


@dataclass(frozen=True)
class Errors:
    """Differences from the exact log-probabilities, the engine's and those of plain torch in the engine's dtype."""

    ours: Tensor
    torchs: Tensor


@pytest.fixture(scope="module")
def engines() -> Iterator[Executor]:
    with engine_process() as process:
        process.submit(_choose_kernels_of_every_processor).result()
        yield process


def _choose_kernels_of_every_processor() -> None:
    """On a processor with AMX, vLLM's kernels take int8 inputs in 16 bits alone, and quantise the inputs of int4 and AWQ."""
    os.environ["VLLM_CPU_INT4_W4A8"] = "0"
    torch.cpu._is_amx_tile_supported = lambda: False


def errors(scheme: str, dtype: str, folder: Path, engines: Executor) -> Errors:
    """Of a mixed batch over the quantised Llama; exact is the same quantised model, with its hooks, in float32."""
    model = LLAMA.build(folder / "model")
    adapters = make_adapters(LLAMA, folder / "model", folder / "adapters")
    SCHEMES[scheme].write(model, folder / "model")
    asked = [(adapter, prompt) for prompt in PROMPTS for adapter in (None, *adapters)]
    options = {"dtype": dtype}
    answers, *_ = engines.submit(
        answer_in_rounds, folder / "model", {"LORA": "off"}, asked, options
    ).result()
    told = [
        (adapter, prompt, tokens)
        for (adapter, prompt), (tokens, _) in zip(asked, answers, strict=True)
    ]
    exact = [reference_logprobs(model, LLAMA, *request) for request in told]
    for (adapter, prompt, tokens), edited in zip(told, exact, strict=True):
        if adapter is not None:
            assert (
                edited - reference_logprobs(model, LLAMA, None, prompt, tokens)
            ).abs().max() > EFFECT, adapter.name
    model.to(getattr(torch, dtype))
    rounded = [reference_logprobs(model, LLAMA, *request) for request in told]
    found = Errors(
        torch.cat(
            [(ours - theirs).abs() for (_, ours), theirs in zip(answers, exact, strict=True)]
        ),
        torch.cat([(ours - theirs).abs() for ours, theirs in zip(rounded, exact, strict=True)]),
    )
    print(f"{scheme} in {dtype}: largest logprob difference {found.ours.max():.2g}, mean {found.ours.mean():.2g}, "
          f"median {found.ours.median():.2g}; "
          f"plain torch {found.torchs.max():.2g} and {found.torchs.mean():.2g}")  # fmt: skip
    return found


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_quantised_weights_and_inputs_answer_as_in_plain_torch(
    scheme: str, tmp_path: Path, engines: Executor
) -> None:
    found = errors(scheme, "float32", tmp_path, engines).ours
    # An input between two numbers of the scheme may be rounded to either, which alone moves a log-probability by up to 0.1.
    assert found.median() < 1e-4
    assert found.mean() < 3e-3
    assert found.max() < 0.3


# With inputs quantised too, 16 bits would hide a wrong edit: their rounding follows the dtype's noise.
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        *(("int4", "bfloat16"), ("awq", "bfloat16")),
        *(
            pytest.param(scheme, "float16", marks=[pytest.mark.gpu, on_gpu])
            for scheme in ("fp8_weights", "awq", "int4")
        ),
    ],
)
def test_in_16_bits_answers_are_as_close_as_those_of_plain_torch(
    scheme: str, dtype: str, tmp_path: Path, engines: Executor
) -> None:
    found = errors(scheme, dtype, tmp_path, engines)
    assert found.ours.max() <= ALLOWANCE * found.torchs.max()
    assert found.ours.mean() <= ALLOWANCE * found.torchs.mean()
