"""An engine in bfloat16 against pyreft's float32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from reft_serve.adapters.directory import Adapter, read_adapter
from reft_serve.interventions.activations import activate
from reft_serve.interventions.kinds import fold
from tests.support.engine.engines import import_saves, running_engine
from tests.support.paths import GOLDEN

ALLOWANCE = 1.5


def check_bfloat16(folder: Path, **options: Any) -> None:
    """Every bfloat16 save of the Llama through a `running_engine`, against the exact answer."""
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    saves = import_saves("tiny-llama", folder, "bfloat16")
    assert len(saves) == 6
    model = (
        AutoModelForCausalLM.from_pretrained(GOLDEN / "models" / "tiny-llama", dtype=torch.bfloat16)
        .double()
        .eval()
    )
    requests, exact, golden = [], [], []
    for number, (save, path) in enumerate(saves.items(), 1):
        adapter, vectors = read_adapter(path), load_file(save.vectors)
        for i, prompt in enumerate(
            json.loads(save.vectors.with_suffix(".json").read_text())["prompts"]
        ):
            requests.append((prompt["token_ids"], LoRARequest(save.name, number, str(path))))
            exact.append(exact_logits(model, adapter, prompt["token_ids"]).log_softmax(-1))
            golden.append(vectors[f"logits/{i}"].double().log_softmax(-1))
    with running_engine(
        "tiny-llama", {"LORA": "off"}, dtype="bfloat16", max_logprobs=-1, **options
    ) as engine:
        outputs = engine.generate(
            [{"prompt_token_ids": ids} for ids, _ in requests],
            SamplingParams(temperature=0.0, max_tokens=1, logprobs=-1),
            lora_request=[adapter for _, adapter in requests],
            use_tqdm=False,
        )
    ours = [
        torch.tensor([first[token].logprob for token in range(len(first))], dtype=torch.float64)
        for first in (output.outputs[0].logprobs[0] for output in outputs)
    ]
    theirs_off = torch.stack([(a - b).abs().max() for a, b in zip(golden, exact, strict=True)])
    ours_off = torch.stack([(a - b).abs().max() for a, b in zip(ours, exact, strict=True)])
    print(f"largest logprob error in bfloat16: pyreft {theirs_off.max():.3f}, ours {ours_off.max():.3f}; "
          f"means {theirs_off.mean():.3f} and {ours_off.mean():.3f}")  # fmt: skip
    assert ours_off.max() <= ALLOWANCE * theirs_off.max()
    assert ours_off.mean() <= ALLOWANCE * theirs_off.mean()


def exact_logits(model: Any, adapter: Adapter, token_ids: list[int]) -> Tensor:
    with torch.no_grad(), hooked(model, adapter, len(token_ids)):
        logits: Tensor = model(torch.tensor([token_ids])).logits[0, -1]
    return logits


@contextmanager
def hooked(model: Any, adapter: Adapter, prompt_len: int) -> Iterator[None]:
    """The model with the adapter's edits at its block outputs, in float64."""
    prefix, suffix = adapter.manifest.positions.indices(prompt_len)
    handles = []
    for spec, weights in zip(adapter.manifest.interventions, adapter.weights, strict=True):
        assert spec.component == "block_output"
        at, unit = (
            {"both": prefix + suffix, "prefix": prefix, "suffix": suffix}[spec.part],
            fold(weights, torch.float64),
        )

        def edit(_: Any, __: Any, output: Any, at: list[int] = at, unit: Any = unit) -> None:
            h = output if isinstance(output, Tensor) else output[0]
            z = h[0, at] @ unit.A.T + unit.b
            z[:, : unit.activated] = activate(z[:, : unit.activated], unit.activation)
            h[0, at] += z @ unit.B

        handles.append(model.model.layers[spec.layer].register_forward_hook(edit))
    yield
    for handle in handles:
        handle.remove()
