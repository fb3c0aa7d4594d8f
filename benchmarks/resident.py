"""A thousand adapters on one engine: the memory they take, and how long a load holds up the engine.

A worker runs no step while it loads an adapter, so a load's time on the worker is the stall. Memory is the worker's own
(private and shared resident pages), before and after, against the bytes of the adapters' tensors.

  scripts/bench resident
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks._report import save
from tests.support.shapes import Shape, reft_adapter


def main() -> None:
    """Run the benchmark, print its lines, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--more", type=int, default=200, help="loads beyond, each evicting one")
    parser.add_argument("--rank", type=int, default=4)
    args = parser.parse_args()
    shape = Shape()
    os.environ |= {
        "REFT_LORA": "off",
        "REFT_MAX_RANK": str(args.rank),
        "REFT_MAX_INTERVENTIONS": str(shape.layers),
    }
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as folder:
        result = _run(args, shape, Path(folder))
    console = Console()
    tensors, pool, grown = (result[f"{name}_bytes"] / 1e6 for name in ("tensor", "pool", "grown"))
    console.print(
        f"{args.adapters} adapters of rank {args.rank} on {shape.layers} layers: their tensors {tensors:.1f} MB, "
        f"pool {pool:.1f} MB ({result['pool_ratio']:.3f}x), worker grew by {grown:.1f} MB ({result['grown_ratio']:.3f}x)"
    )
    console.print(
        f"load of one more: median {result['load_ms_median']:.2f} ms, p99 {result['load_ms_p99']:.2f} ms, "
        f"max {result['load_ms_max']:.2f} ms over {args.more} loads"
    )
    save("resident", result)


def _run(args: argparse.Namespace, shape: Shape, folder: Path) -> dict[str, Any]:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    paths = [
        reft_adapter(folder / f"adapter{i}", shape, args.rank, "f7+l7", i)
        for i in track(range(args.adapters + args.more), "writing adapters")
    ]
    engine = LLM(
        str(shape.write(folder / "model")), load_format="dummy", skip_tokenizer_init=True, dtype=shape.dtype,
        enable_lora=True, max_loras=args.adapters, max_model_len=512, enforce_eager=True, disable_log_stats=True,
    )  # fmt: skip

    def stats() -> dict[str, float]:
        counters: dict[str, float] = engine.collective_rpc("reft_stats")[0]
        return counters

    def load(numbers: range) -> list[float]:
        seconds = []
        for i in track(numbers, "loading"):
            engine.llm_engine.add_lora(LoRARequest(paths[i].name, i + 1, str(paths[i])))
            seconds.append(stats()["load_seconds_last"])
        return sorted(seconds)

    load(range(8))
    pid, before = int(stats()["pid"]), _resident_bytes(int(stats()["pid"]))
    load(range(8, args.adapters))
    grown, counters = _resident_bytes(pid) - before, stats()
    assert counters["resident"] == args.adapters
    assert counters["evictions"] == 0
    more = load(range(args.adapters, len(paths)))
    own = shape.layers * (2 * args.rank * shape.hidden + args.rank) * 4
    return {
        "arguments": vars(args),
        "parameters": shape.parameters,
        "tensor_bytes": own * args.adapters,
        "pool_bytes": counters["pool_bytes"],
        "pool_ratio": counters["pool_bytes"] / (own * args.adapters),
        "grown_bytes": grown,
        "grown_ratio": grown / (own * (args.adapters - 8)),
        "load_ms_median": more[len(more) // 2] * 1e3,
        "load_ms_p99": more[int(len(more) * 0.99)] * 1e3,
        "load_ms_max": more[-1] * 1e3,
    }


def _resident_bytes(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
