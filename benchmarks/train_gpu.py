"""Training on a GPU: an 8B-shaped frozen base in bfloat16 with gradient checkpointing, and what share of the card it uses.

The base has Llama 3's shape and random weights, made on the card; LoReFT of rank 8 at all layers, f7+l7. Printed and kept:
tokens per second, peak memory, and the share of the card's own ceiling, which is a large bfloat16 product timed first. A
token costs 2 operations per weight forward, 2 more where the backward pass computes it again, and 2 backward (no gradient
of the frozen weights); the share counts the forward and backward ones alone, so recomputing is not a merit.

  scripts/bench train_gpu                          an NVIDIA GPU with about 40 GB free
  scripts/bench train_gpu --pyreft ENV/bin/python  pyreft 0.1.0 as well, from that environment, without checkpointing (its
                                                   hooks do not survive it) and with --pyreft-batch examples at once
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks._models import Shape
from benchmarks._report import save
from benchmarks._train_ours import Rows, timed_steps
from benchmarks._train_sides import ask, side
from reft_serve.interventions.modules import Intervention
from reft_serve.interventions.positions import Part, PositionRule
from reft_serve.training.hooked import Edit, EditedModel
from reft_serve.training.plan import AdapterPlan, Plan

SHAPES = {
    "8b": Shape(hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab=128256, context=8192),
    "1b": Shape(hidden=2048, layers=16, heads=32, kv_heads=8, ffn=8192, vocab=128256, context=8192),
    "tiny": Shape(hidden=128, layers=2, heads=2, kv_heads=1, ffn=256, vocab=2048),
}


def main() -> None:
    """Run the benchmark, print its figures, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of an example, a quarter of them its answer")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pyreft", metavar="PYTHON", help="interpreter of an environment with pyreft 0.1.0")
    parser.add_argument("--pyreft-batch", type=int, default=2)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(
            2, "train_gpu needs an NVIDIA GPU, and torch sees none here: scripts/bench train measures on a CPU\n"
        )
    result = measure(args, torch.device("cuda"))
    Console().print_json(data=result)
    save("train-gpu", result)


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
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
        if args.pyreft:
            lm.save_pretrained(folder)
            del lm
            gc.collect()
            result["pyreft"] = _pyreft(args, folder, examples, device)
    return result


def _base(shape: Shape, folder: Path, device: torch.device) -> Any:
    config = LlamaConfig.from_pretrained(shape.write(folder))
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _examples(shape: Shape, count: int, length: int) -> Rows:
    choose = random.Random(0)
    return [([choose.randint(3, shape.vocab - 1) for _ in range(length)], length - length // 4) for _ in range(count)]


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


def _ours(lm: Any, shape: Shape, plan: Plan, examples: Rows, device: torch.device) -> dict[str, float]:
    edits = [Edit(k, Part.PREFIX, Intervention("loreft", shape.hidden, plan.adapter.rank)) for k in range(shape.layers)]
    model = EditedModel(lm, edits, gradient_checkpointing=True).to(device)
    packed = model.can_pack(len(examples[0][0]))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ends = timed_steps(model, plan, examples, packed=packed)
    seconds = [b[0] - a[0] for a, b in itertools.pairwise(ends)][1:]
    tokens = plan.batch * len(examples[0][0])
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return {"tokens_per_second": tokens / statistics.median(seconds), "peak_gib": peak, "packed": packed}


def _pyreft(args: argparse.Namespace, base: str, examples: Rows, device: torch.device) -> dict[str, float]:
    setup = {
        "base": base, "dtype": "bfloat16", "threads": 2, "rank": 8, "positions": "f7+l7", "batch": args.pyreft_batch,
        "accumulate": 1, "device": device.type,
    }  # fmt: skip
    command = [args.pyreft, str(Path(__file__).parent / "_train_pyreft.py")]
    with side(command, setup) as them:
        answer = ask(them, {"examples": examples[: args.pyreft_batch * (args.steps + 1)]})
    rate = args.pyreft_batch * args.length / statistics.median(answer["seconds"][1:])
    return {"tokens_per_second": rate, "peak_gib": answer["peak_mib"] / 1024, "batch": args.pyreft_batch}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
