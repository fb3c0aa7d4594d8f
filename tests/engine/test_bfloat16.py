"""bfloat16: how far an answer may be from the exact one.

The exact answer is computed here in float64 from the bfloat16 weights. pyreft's own bfloat16 run
(the golden vectors) is off from it by what bfloat16 itself costs; the engine may be off by half as
much again, since its kernels round at other places, and by no more.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reft_serve.adapters.directory import read_adapter
from tests.support.engine.bfloat16_check import check_bfloat16, exact_logits
from tests.support.engine.engines import import_saves
from tests.support.paths import GOLDEN


def test_bfloat16_is_as_close_to_the_exact_answer_as_pyreft_is(tmp_path: Path) -> None:
    check_bfloat16(tmp_path)


def test_the_exact_reference_is_that_of_pyreft_in_float32(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    saves = import_saves("tiny-llama", tmp_path)
    save = next(s for s in saves if s.name == "tiny-llama-direft_f5l5")
    model = AutoModelForCausalLM.from_pretrained(
        GOLDEN / "models" / "tiny-llama", dtype=torch.float64
    ).eval()
    vectors = load_file(save.vectors)
    for i, prompt in enumerate(
        json.loads(save.vectors.with_suffix(".json").read_text())["prompts"]
    ):
        logits = exact_logits(model, read_adapter(saves[save]), prompt["token_ids"])
        assert logits.tolist() == pytest.approx(vectors[f"logits/{i}"].tolist(), abs=1e-4)
