"""A training step against the device's ceiling."""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from reft_serve.interventions.modules import Intervention
from reft_serve.interventions.positions import Part, PositionRule
from reft_serve.training.model.edited_model import Edit, EditedModel
from reft_serve.training.plan import AdapterPlan, Plan
from tests.support.shapes import Shape
from tests.support.training.steps import Rows, timed_steps

SHAPES = {
    "8b": Shape(
        hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab=128256, context=8192
    ),
    "1b": Shape(hidden=2048, layers=16, heads=32, kv_heads=8, ffn=8192, vocab=128256, context=8192),
    "tiny": Shape(hidden=128, layers=2, heads=2, kv_heads=1, ffn=256, vocab=2048),
}
# The other side: measures the same examples with the base in a folder.
Other = Callable[[argparse.Namespace, str, Rows, torch.device], dict[str, float]]


def cuda(parser: argparse.ArgumentParser) -> torch.device:
    """The GPU. Ends the program with a sentence if there is none."""
    if not torch.cuda.is_available():
        parser.exit(
            2,
            "train_gpu needs an NVIDIA GPU, and torch sees none here: scripts/bench train measures on a CPU\n",
        )
    return torch.device("cuda")


def measure(
    args: argparse.Namespace, device: torch.device, other: Other | None = None
) -> dict[str, Any]:
    """All figures, on `device`."""
    shape = SHAPES[args.shape]
    plan = Plan(
        AdapterPlan("loreft", 8, None, PositionRule("f7+l7")),
        epochs=1, batch=args.batch, dtype="bfloat16", gradient_checkpointing=True, shuffle=False,
    )  # fmt: skip
    ceiling = _ceiling(device)
    with tempfile.TemporaryDirectory() as folder:
        lm = _base(shape, Path(folder), device)
        weights = sum(p.numel() for p in lm.parameters())
        examples = _examples(shape, args.batch * (args.steps + 1), args.length)
        ours = _ours(lm, shape, plan, examples, device)
        operations = 4 * weights * ours["tokens_per_second"]
        result = {
            "shape": args.shape, "parameters": weights, "batch": args.batch, "length": args.length, "dtype": plan.dtype,
            "ceiling_tflops": ceiling / 1e12, "share_of_ceiling": operations / ceiling, "ours": ours,
        }  # fmt: skip
        if other is not None:
            lm.save_pretrained(folder)
            del lm
            gc.collect()
            result["pyreft"] = other(args, folder, examples, device)
    return result


def _base(shape: Shape, folder: Path, device: torch.device) -> Any:
    config = LlamaConfig.from_pretrained(shape.write(folder))
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _examples(shape: Shape, count: int, length: int) -> Rows:
    choose = random.Random(0)
    return [
        ([choose.randint(3, shape.vocab - 1) for _ in range(length)], length - length // 4)
        for _ in range(count)
    ]


def _ceiling(device: torch.device, size: int = 8192) -> float:
    """Operations per second of a bfloat16 product, the best of five."""
    size = size if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds = []
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        _wait(device)
        seconds.append((time.perf_counter() - started) / 4)
    return float(2 * size**3 / min(seconds[1:]))


def _ours(
    lm: Any, shape: Shape, plan: Plan, examples: Rows, device: torch.device
) -> dict[str, float]:
    edits = [
        Edit(k, Part.PREFIX, Intervention("loreft", shape.hidden, plan.adapter.rank))
        for k in range(shape.layers)
    ]
    model = EditedModel(lm, edits, gradient_checkpointing=True).to(device)
    packed = model.can_pack(len(examples[0][0]))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ends = timed_steps(model, plan, examples, packed=packed)
    seconds = [b[0] - a[0] for a, b in itertools.pairwise(ends)][1:]
    tokens = plan.batch * len(examples[0][0])
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return {
        "tokens_per_second": tokens / statistics.median(seconds),
        "peak_gib": peak,
        "packed": packed,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
