"""What ReFT costs a vLLM engine: base, plugin loaded but unused, K distinct ReFT adapters, K distinct LoRAs.

Every arm is an engine of its own; all are alive at once and take turns in every round, so that a machine that drifts
drifts for all of them. Ratios are of two times measured in one round, and medians over the rounds are quoted.

  scripts/bench serving                                  the 100 M-parameter shape on this machine's CPU
  scripts/bench serving --hidden 4096 --layers 32 --heads 32 --kv-heads 8 --ffn 14336 --vocab 128256   an 8B shape, on a GPU
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks._report import save
from tests.support.shapes import Shape, lora_adapter, reft_adapter

WORKLOADS = {"prefill": (256, 1), "decode": (16, 128), "mixed": (128, 64)}


@dataclass(eq=False)
class Arm:
    """One engine and the adapters its requests use, one after the other."""

    name: str
    engine: Any
    adapters: list[Any]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self, workload: str, requests: int, vocab: int, seed: int) -> None:
        """One round: `requests` requests at once with fresh random prompts."""
        from vllm import SamplingParams

        length, out = WORKLOADS[workload]
        rng = random.Random(seed)
        prompts = [
            {"prompt_token_ids": [rng.randrange(3, vocab) for _ in range(length)]}
            for _ in range(requests)
        ]
        params = SamplingParams(
            temperature=0.0, max_tokens=out, min_tokens=out, ignore_eos=True, detokenize=False
        )
        adapters = (
            [self.adapters[i % len(self.adapters)] for i in range(requests)]
            if self.adapters
            else None
        )
        started = time.perf_counter()
        self.engine.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        self.seconds.setdefault(workload, []).append(time.perf_counter() - started)


def main() -> None:
    """Run the benchmark, print its table, write JSON and a plot."""
    args = _arguments()
    shape = Shape(
        args.hidden, args.layers, args.heads, args.kv_heads, args.ffn, args.vocab, 2048, args.dtype
    )
    console = Console()
    console.print(
        f"{shape.parameters / 1e6:,.0f} M parameters, {args.requests} requests per round, {args.rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as folder:
        arms = _arms(args, shape, Path(folder), console)
        _measure(arms, args, shape)
        stats = {
            arm.name: arm.engine.collective_rpc("reft_stats")[0]
            for arm in arms
            if arm.name != "base"
        }
    result = _result(args, shape, arms, stats)
    _print(console, result)
    save("serving" if args.tag is None else f"serving-{args.tag}", result, _plot)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("hidden", 768),
        ("layers", 12),
        ("heads", 12),
        ("kv-heads", 12),
        ("ffn", 2048),
        ("vocab", 32000),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--arms", default="base,idle,reft:32,lora:32", help="of base, idle, reft:K, lora:K"
    )
    parser.add_argument("--against", default="base", help="the arm that ratios are to")
    parser.add_argument("--workloads", default="prefill,decode,mixed")
    parser.add_argument("--requests", type=int, default=32, help="requests at once")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--lora-rounds", type=int, default=2, help="rounds that the slow LoRA arm takes part in"
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--positions", default="f7+l7")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument(
        "--gpu-memory", type=float, default=0.2, help="share of the GPU that each engine may take"
    )
    parser.add_argument(
        "--cpu-cache", type=int, default=3, help="GiB of KV cache of each engine on a CPU"
    )
    parser.add_argument("--tag", help="suffix of the result's file name")
    return parser.parse_args()


def _arms(args: argparse.Namespace, shape: Shape, folder: Path, console: Console) -> list[Arm]:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    model = shape.write(folder / "model")
    arms = []
    for name in args.arms.split(","):
        kind, _, count = name.partition(":")
        paths: list[Path] = []
        if kind == "reft":
            paths = [
                reft_adapter(folder / f"{kind}{count}-{i}", shape, args.rank, args.positions, i)
                for i in range(int(count))
            ]
        elif kind == "lora":
            paths = [
                lora_adapter(folder / f"{kind}{count}-{i}", shape, args.lora_rank, i)
                for i in range(int(count))
            ]
        os.environ["REFT_LORA"] = "on" if kind == "lora" else "off"
        os.environ["REFT_MAX_RANK"] = str(args.rank)
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(args.cpu_cache)
        options: dict[str, Any] = {}
        if kind != "base":
            options = {
                "enable_lora": True,
                "max_loras": max(len(paths), 1),
                "max_lora_rank": max(args.lora_rank, 8),
            }
        with console.status(f"starting {name}"):
            engine = LLM(
                str(model), load_format="dummy", skip_tokenizer_init=True, dtype=args.dtype, enforce_eager=args.eager,
                max_model_len=512, max_num_seqs=256, max_num_batched_tokens=2048, enable_prefix_caching=False,
                disable_log_stats=True, seed=0, gpu_memory_utilization=args.gpu_memory, **options,
            )  # fmt: skip
        adapters = [LoRARequest(path.name, i, str(path)) for i, path in enumerate(paths, 1)]
        arms.append(Arm(name, engine, adapters))
        console.print(f"started {name}")
    return arms


def _measure(arms: list[Arm], args: argparse.Namespace, shape: Shape) -> None:
    workloads = args.workloads.split(",")
    with Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=len(workloads) * (args.rounds + 1))
        for workload in workloads:
            for turn in range(-1, args.rounds):
                order = arms if turn % 2 else arms[::-1]
                for arm in order:
                    if arm.name.startswith("lora") and turn >= args.lora_rounds:
                        continue
                    arm.run(workload, args.requests, shape.vocab, seed=turn)
                    if turn < 0:  # loads adapters, warms caches; not counted
                        arm.seconds[workload].clear()
                progress.advance(task)


def _result(
    args: argparse.Namespace, shape: Shape, arms: list[Arm], stats: dict[str, Any]
) -> dict[str, Any]:
    reference = next(arm for arm in arms if arm.name == args.against)
    rows = []
    for workload in args.workloads.split(","):
        tokens = args.requests * sum(WORKLOADS[workload])
        for arm in arms:
            seconds = arm.seconds[workload]
            ratios = [r / s for r, s in zip(reference.seconds[workload], seconds, strict=False)]
            speed = tokens / statistics.median(seconds)
            rows.append({
                "workload": workload, "arm": arm.name, "seconds": seconds, "tokens_per_s": speed,
                "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
            })  # fmt: skip
    return {"arguments": vars(args), "parameters": shape.parameters, "rows": rows, "stats": stats}


def _print(console: Console, result: dict[str, Any]) -> None:
    args = result["arguments"]
    table = Table(title=f"speed relative to {args['against']}, median of rounds (least, most)")
    for column in ("workload", "arm", "tokens/s", "ratio", "range"):
        table.add_column(column, justify="left" if column in ("workload", "arm") else "right")
    for row in result["rows"]:
        span = f"{row['ratio_min']:.3f} to {row['ratio_max']:.3f}"
        table.add_row(
            row["workload"], row["arm"], f"{row['tokens_per_s']:,.0f}", f"{row['ratio']:.3f}", span
        )
    console.print(table)
    for name, stats in result["stats"].items():
        if stats:
            idle, busy = stats["decode_row_seconds_median"] * 1e6, stats["row_seconds_median"] * 1e6
            console.print(
                f"{name}: host time on rows {idle:.0f} us per step that edits nothing, {busy:.0f} us per step that does; "
                f"op bodies {stats['op_bodies']} in {stats['steps_with_rows']} of {stats['steps']} steps; "
                f"load median {stats['load_seconds_median'] * 1e3:.1f} ms"
            )


def _plot(result: dict[str, Any], axes: Any) -> None:
    arms = list(dict.fromkeys(row["arm"] for row in result["rows"]))
    workloads = list(dict.fromkeys(row["workload"] for row in result["rows"]))
    for i, arm in enumerate(arms):
        rows = [row for row in result["rows"] if row["arm"] == arm]
        at = [k + (i - len(arms) / 2 + 0.5) * 0.8 / len(arms) for k in range(len(workloads))]
        bars = axes.bar(at, [row["ratio"] for row in rows], 0.75 / len(arms), label=arm)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel(f"speed relative to {result['arguments']['against']}")
    axes.legend(frameon=False, ncols=len(arms), loc="lower center", bbox_to_anchor=(0.5, 1.0))


if __name__ == "__main__":
    main()
