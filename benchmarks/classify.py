"""Texts per second with adapters that have heads of their own, against the base model's embeddings of the same texts.

One engine of a BERT's shape (MiniLM's by default, weights at random). Arms, in turn: the base's embeddings; classes by one
adapter; classes by several adapters, mixed in each batch. The figure is the median of each round's ratio to the base.

  scripts/bench classify
  scripts/bench classify --base MODEL_DIR      a model that is there, such as `scripts/models minilm`
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks._report import save


def main() -> None:
    """Run the benchmark, print its lines, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", type=Path, help="a BERT's or RoBERTa's directory; one of MiniLM's shape otherwise"
    )
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--texts", type=int, default=256, help="in each arm of a round")
    parser.add_argument("--tokens", type=int, default=64, help="of a text, on average")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--positions", default="f3")
    args = parser.parse_args()
    os.environ |= {"REFT_LORA": "off"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as folder:
        result = _run(args, Path(folder))
    console = Console()
    for name, ratio in result["ratios"].items():
        console.print(
            f"{name}: {result['texts_per_second'][name]:,.0f} texts/s, {ratio:.3f} of the base's embeddings"
        )
    save("classify", result)


def _run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from vllm import LLM, PoolingParams
    from vllm.lora.request import LoRARequest

    base = args.base or _minilm_shaped(folder / "model")
    paths = [_classifier(folder / f"adapter{k}", base, args, k) for k in range(args.adapters)]
    engine = LLM(
        str(base), runner="pooling", dtype="float32", enable_lora=True,
        max_loras=args.adapters, max_num_seqs=32, disable_log_stats=True,
    )  # fmt: skip
    chance = random.Random(0)
    lengths = [chance.randint(args.tokens // 2, 3 * args.tokens // 2) for _ in range(args.texts)]
    texts = [{"prompt_token_ids": [chance.randint(1000, 9000) for _ in range(n)]} for n in lengths]
    loras = [LoRARequest(path.name, k + 1, str(path)) for k, path in enumerate(paths)]
    arms: dict[str, tuple[str, list[LoRARequest | None]]] = {
        "base": ("embed", [None] * len(texts)),
        "one adapter": ("classify", [loras[0]] * len(texts)),
        f"{args.adapters} adapters": (
            "classify",
            [loras[k % len(loras)] for k in range(len(texts))],
        ),
    }

    def seconds(arm: str) -> float:
        task, requests = arms[arm]
        began = time.perf_counter()
        engine.encode(
            texts, PoolingParams(), lora_request=requests, pooling_task=task, use_tqdm=False
        )  # type: ignore[arg-type]
        return time.perf_counter() - began

    for arm in arms:
        seconds(arm)
    spent: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in track(range(args.rounds), "rounds"):
        for arm in sorted(arms, reverse=bool(turn % 2)):
            spent[arm].append(seconds(arm))
    ratios = {
        arm: statistics.median(b / a for a, b in zip(spent[arm], spent["base"], strict=True))
        for arm in arms
    }
    rates = {arm: args.texts / statistics.median(taken) for arm, taken in spent.items()}
    arguments = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    return {"arguments": arguments, "texts_per_second": rates, "ratios": ratios, "seconds": spent}


def _minilm_shaped(folder: Path) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    BertModel(config).save_pretrained(folder)
    words = Tokenizer(
        models.WordLevel({f"w{k}": k for k in range(config.vocab_size)}, unk_token="w100")
    )
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w100").save_pretrained(folder)
    return folder


def _classifier(path: Path, base: Path, args: argparse.Namespace, seed: int) -> Path:
    from reft_serve.adapters.base_model import read_base_model
    from reft_serve.adapters.directory import publish
    from reft_serve.adapters.head import HeadSpec
    from reft_serve.adapters.manifest import InterventionSpec, Manifest
    from reft_serve.interventions.heads import Head
    from reft_serve.interventions.kinds import Weights
    from reft_serve.interventions.positions import PositionRule
    from reft_serve.interventions.vocabulary import ACTIVATION_CODES

    facts, chance = read_base_model(base), torch.Generator().manual_seed(seed)
    width, rank = facts.hidden_size, args.rank

    def matrix(rows: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=chance) * width**-0.5

    specs = tuple(
        InterventionSpec(layer=layer, component="block_output", kind="loreft", rank=rank)
        for layer in range(facts.num_hidden_layers)
    )
    edits = [
        Weights.of(
            "loreft",
            {
                "R": torch.linalg.qr(matrix(rank).T)[0].T.contiguous(),
                "W": matrix(rank),
                "b": torch.zeros(rank),
            },
        )
        for _ in specs
    ]
    labels = tuple(f"label {k}" for k in range(2 + seed % 3))
    spec = HeadSpec(
        problem_type="single_label_classification", labels=labels, reads="first", activation="tanh"
    )
    tensors = {
        "dense.weight": matrix(width),
        "dense.bias": torch.zeros(width),
        "out.weight": matrix(len(labels)),
    }
    manifest = Manifest(
        base_model=facts, interventions=specs, positions=PositionRule(args.positions), head=spec
    )
    publish(path, manifest, edits, head=Head.of(tensors, ACTIVATION_CODES["tanh"]))
    return path


if __name__ == "__main__":
    main()
