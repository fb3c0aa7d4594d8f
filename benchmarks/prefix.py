"""One long prompt prefix and many adapters: who computes it how often, and what that costs.

K requests come at once, each with an adapter of its own: the same prefix (a system prompt, a document), then a question.
An adapter that edits the last tokens of a prompt only (`l1`, `l5`) leaves the prefix as the base model computes it, so one
copy in the prefix cache serves all of them and the base. A LoRA changes every token's keys and values, so each adapter
computes the whole prefix again. `num_cached_tokens` of vLLM's answers says who computed what. To tell the cache's share
from that of LoRA's kernels, which are slow on a CPU, a fourth arm has ReFT adapters that edit the first token too, so that
they share nothing either.

Every arm is an engine of its own, prefix cache on; all are alive at once and take turns in every round with a fresh random
prefix, so that nothing is warm but the adapters. Ratios are of two times of one round; their medians are quoted.

  scripts/bench prefix                     32 adapters, 2,048 tokens, a small model: LoRA takes minutes of a CPU even so
  scripts/bench prefix --prefix 4096       as long as the prompts that this is for
  scripts/bench prefix --positions l5
  scripts/bench prefix --hidden 768 --layers 12 --heads 12 --ffn 2048 --prefix 512      a larger model, a shorter prefix
  scripts/bench prefix --prefix 4096 --compile --hidden 4096 --layers 32 --heads 32 --kv-heads 8 --ffn 14336 --vocab 128256
                                           an 8B shape, on a GPU
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

ARMS = ("base", "reft", "reft unshared", "lora")


@dataclass(frozen=True, slots=True)
class Round:
    """One arm's turn: how long all answers took, and how the prompts' tokens were come by."""

    seconds: float
    prompt_tokens: int
    cached_tokens: int


@dataclass(eq=False)
class Arm:
    """One engine and the adapters of its requests; none for the base."""

    name: str
    engine: Any
    adapters: list[Any]
    rounds: list[Round] = field(default_factory=list)

    def run(self, prompts: list[list[int]], out: int) -> Round:
        """All prompts at once, prompt i with adapter i."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=out, min_tokens=out, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        started = time.perf_counter()
        answers = self.engine.generate(
            inputs, params, lora_request=self.adapters or None, use_tqdm=False
        )
        seconds = time.perf_counter() - started
        cached = sum(answer.num_cached_tokens for answer in answers)
        return Round(seconds, sum(map(len, prompts)), cached)


def main() -> None:
    """Run the benchmark, print its table, write JSON and a plot."""
    args = _arguments()
    shape = Shape(
        args.hidden, args.layers, args.heads, args.kv_heads or args.heads, args.ffn, args.vocab,
        args.prefix + args.question + args.out, args.dtype,
    )  # fmt: skip
    console = Console()
    console.print(
        f"{shape.parameters / 1e6:,.0f} M parameters ({args.dtype}); {args.adapters} adapters, one request each: "
        f"{args.prefix:,} shared prompt tokens, {args.question} of its own, {args.out} generated; {args.rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as folder:
        arms = _arms(args, shape, Path(folder), console)
        _measure(arms, args)
    result = _result(args, shape, arms)
    _print(console, result)
    save("prefix" if args.tag is None else f"prefix-{args.tag}", result, _plot)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("hidden", 256),
        ("layers", 4),
        ("heads", 4),
        ("ffn", 704),
        ("vocab", 4096),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument(
        "--prefix", type=int, default=2048, help="prompt tokens that all requests share"
    )
    parser.add_argument(
        "--question", type=int, default=32, help="prompt tokens of each request's own"
    )
    parser.add_argument("--out", type=int, default=8, help="generated tokens of each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--lora-rounds", type=int, default=2, help="rounds that the slow LoRA arm takes part in"
    )
    parser.add_argument(
        "--positions", default="l1", help="position rule of the ReFT adapters: l1, l5, ..."
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile, which vLLM leaves out for LoRA on a CPU",
    )
    parser.add_argument(
        "--gpu-memory", type=float, default=0.3, help="share of the GPU that each engine may take"
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
    os.environ |= {"REFT_MAX_RANK": str(args.rank), "VLLM_CPU_KVCACHE_SPACE": str(args.cpu_cache)}
    arms = []
    for name in ARMS:
        paths: list[Path] = []
        if name == "lora":
            paths = [
                lora_adapter(folder / f"lora{i}", shape, args.lora_rank, i)
                for i in range(args.adapters)
            ]
        elif name != "base":
            positions = args.positions if name == "reft" else f"f1+{args.positions}"
            paths = [
                reft_adapter(folder / name / f"reft{i}", shape, args.rank, positions, i)
                for i in range(args.adapters)
            ]
        os.environ["REFT_LORA"] = "on" if name == "lora" else "off"
        options: dict[str, Any] = {}
        if paths:
            options = {
                "enable_lora": True,
                "max_loras": args.adapters,
                "max_lora_rank": max(args.lora_rank, 8),
            }
        with console.status(f"starting {name}"):
            engine = LLM(
                str(model), load_format="dummy", skip_tokenizer_init=True, dtype=args.dtype, enforce_eager=not args.compile,
                max_model_len=shape.context, max_num_seqs=max(args.adapters, 32), max_num_batched_tokens=2048,
                enable_prefix_caching=True, disable_log_stats=True, seed=0, gpu_memory_utilization=args.gpu_memory,
                **options,
            )  # fmt: skip
        adapters = [LoRARequest(path.name, i, str(path)) for i, path in enumerate(paths, 1)]
        arms.append(Arm(name, engine, adapters))
        console.print(f"started {name}")
    return arms


def _measure(arms: list[Arm], args: argparse.Namespace) -> None:
    with Progress(transient=True) as progress:
        task = progress.add_task(
            "measuring", total=(len(arms) - 1) * (args.rounds + 1) + args.lora_rounds + 1
        )
        for turn in range(-1, args.rounds):
            # The turn before the first loads the adapters and is not counted: a short prefix does.
            prompts = _prompts(args, turn, args.prefix if turn >= 0 else 64)
            for arm in arms if turn % 2 else arms[::-1]:
                if arm.name == "lora" and turn >= args.lora_rounds:
                    continue
                done = arm.run(prompts, args.out)
                if turn >= 0:
                    arm.rounds.append(done)
                    progress.console.print(f"round {turn}, {arm.name}: {done.seconds:.2f} s")
                progress.advance(task)


def _prompts(args: argparse.Namespace, seed: int, length: int) -> list[list[int]]:
    rng = random.Random(seed)
    prefix = [rng.randrange(3, args.vocab) for _ in range(length)]
    return [
        prefix + [rng.randrange(3, args.vocab) for _ in range(args.question)]
        for _ in range(args.adapters)
    ]


def _result(args: argparse.Namespace, shape: Shape, arms: list[Arm]) -> dict[str, Any]:
    slowest, rows = arms[-1], []
    for arm in arms:
        ratios = [
            theirs.seconds / ours.seconds
            for theirs, ours in zip(slowest.rounds, arm.rounds, strict=False)
        ]
        computed = [done.prompt_tokens - done.cached_tokens for done in arm.rounds]
        rows.append({
            "arm": arm.name, "seconds": [done.seconds for done in arm.rounds],
            "seconds_median": statistics.median(done.seconds for done in arm.rounds),
            "faster_than_lora": statistics.median(ratios),
            "faster_than_lora_min": min(ratios), "faster_than_lora_max": max(ratios),
            "prompt_tokens": arm.rounds[0].prompt_tokens, "computed_tokens": max(computed),
            "cached_share": min(done.cached_tokens / done.prompt_tokens for done in arm.rounds),
            "prefix_computed_times": (max(computed) - args.adapters * args.question) / args.prefix,
        })  # fmt: skip
    return {"arguments": vars(args), "parameters": shape.parameters, "rows": rows}


def _print(console: Console, result: dict[str, Any]) -> None:
    args = result["arguments"]
    table = Table(
        title=f"{args['adapters']} adapters ({args['positions']}) on one prefix of {args['prefix']:,} tokens, all answers"
    )
    for column in (
        "arm",
        "seconds",
        "prompt tokens",
        "computed",
        "cached",
        "prefix computed",
        "faster than LoRA",
        "range",
    ):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for row in result["rows"]:
        table.add_row(
            row["arm"], f"{row['seconds_median']:.2f}", f"{row['prompt_tokens']:,}", f"{row['computed_tokens']:,}",
            f"{row['cached_share']:.1%}", f"{row['prefix_computed_times']:.2f} times", f"{row['faster_than_lora']:.1f}x",
            f"{row['faster_than_lora_min']:.1f} to {row['faster_than_lora_max']:.1f}",
        )  # fmt: skip
    console.print(table)
    reft, unshared = (
        next(row for row in result["rows"] if row["arm"] == arm)
        for arm in ("reft", "reft unshared")
    )
    console.print(
        f"ReFT is {reft['faster_than_lora']:.1f}x faster than LoRA; without the shared prefix it would be "
        f"{unshared['faster_than_lora']:.1f}x"
    )


def _plot(result: dict[str, Any], axes: Any) -> None:
    args, rows = result["arguments"], result["rows"]
    labels = {
        "base": "base model",
        "reft": f"{args['adapters']} ReFT, {args['positions']}",
        "reft unshared": f"{args['adapters']} ReFT, f1+{args['positions']}",
        "lora": f"{args['adapters']} LoRA, r{args['lora_rank']}",
    }
    colours = ["0.6", "tab:green", "tab:olive", "tab:orange"]
    bars = axes.barh(
        [labels[row["arm"]] for row in rows], [row["seconds_median"] for row in rows], color=colours
    )
    texts = [
        f"{row['seconds_median']:.1f} s, {row['cached_share']:.0%} of prompt tokens cached"
        for row in rows
    ]
    axes.bar_label(bars, texts, padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=30 * max(row["seconds_median"] for row in rows))
    axes.set_xlabel(
        f"seconds for {args['adapters']} answers on one shared prefix of {args['prefix']:,} tokens"
    )


if __name__ == "__main__":
    main()
