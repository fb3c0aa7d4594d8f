"""Resolution of "auto" for a job, from its base model and data, and the resulting plan. No torch.

The choices are recorded with the job, and an attempt after the first takes them from there, so that
a job is the same run on any worker.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from reft_serve.adapters.manifest import BaseFacts
from reft_serve.interventions.positions import PositionRule
from reft_serve.recipes.hyperparameters import DpoHyperparameters, EveryHyperparameter, MethodName
from reft_serve.training.plan import AdapterPlan, DType, HeadPlan, LoraPlan, Method, Plan

__all__ = ["METHODS", "MICRO_TOKENS", "DataFacts", "most_tokens", "plan_from_job", "resolve"]

MICRO_TOKENS = 8192
"""Tokens of a micro-batch, unless one example is longer."""
METHODS: dict[MethodName, Method] = {
    "supervised": "supervised",
    "dpo": "dpo",
    "classification": "labels",
    "regression": "labels",
    "reward": "reward",
}
"""A job's method as a plan has it."""
_LONGEST = 2048
_WIDE = 1024


@dataclass(frozen=True, slots=True)
class DataFacts:
    """Examples of the training file, and tokens of the longest."""

    examples: int
    longest: int


def most_tokens(asked: DpoHyperparameters, context: int | None) -> int:
    """Tokens of the longest example that is taken: as asked, else 2,048, never more than the
    model's context.
    """
    wanted = _LONGEST if asked.max_tokens == "auto" else asked.max_tokens
    return wanted if context is None else min(wanted, context)


def resolve(
    asked: EveryHyperparameter,
    method: Method,
    base: BaseFacts,
    data: DataFacts,
    max_tokens: int,
    dtype: DType,
    seed: int,
    head: HeadPlan | None = None,
) -> dict[str, Any]:
    """Every hyper-parameter with its value, as JSON; next to them `method`, `dtype` and `seed`, and
    `head` if there is one.

    =================  ==========================================================================
    n_epochs           3; more for few examples, up to 12, for some hundred steps; fewer for
                       very many
    batch_size         4 to 32, growing with the examples
    accumulation       so that a part of a batch has at most 8,192 tokens, each example counted
                       as long as the longest
    learning_rate      9e-4, the paper's, for a hidden size of 1,024 or more; 4e-3 below; times
                       the multiplier
    kind, positions    loreft at f7+l7, tied: the paper's, as are all layers, schedule (linear)
                       and warm-up (0.1)
    rank               4; 8 from 2,000 examples
    save_every         an epoch, at most 500 steps
    =================  ==========================================================================
    """
    batch = _or(asked.batch_size, _batch(data.examples))
    longest = max(1, min(data.longest, max_tokens))
    accumulation = min(batch, _or(asked.accumulation, -(-batch * longest // MICRO_TOKENS)))
    rate = 9e-4 if base.hidden_size >= _WIDE else 4e-3
    lora_rank = _or(asked.lora_rank, 0)
    steps = -(-data.examples // batch)
    # What pyreft's runs on GLUE edit: the first tokens, of which the head reads one.
    rule = (
        {"positions": "f3", "tied": True}
        if head and head.reads != "last" and asked.positions == "auto"
        else {}
    )
    return {
        "method": method,
        "n_epochs": asked.epochs(data.examples),
        "batch_size": batch,
        "accumulation": accumulation,
        "learning_rate": _or(asked.learning_rate, rate * _or(asked.learning_rate_multiplier, 1.0)),
        "learning_rate_multiplier": _or(asked.learning_rate_multiplier, 1.0),
        **asked.shape(data.examples, base.hidden_size),
        **rule,
        "dropout": _or(asked.dropout, 0.0),
        "lora_rank": lora_rank,
        "lora_alpha": _or(asked.lora_alpha, 2.0 * lora_rank) if lora_rank else None,
        "lora_targets": _or(asked.lora_targets, None),
        "schedule": _or(asked.schedule, "linear"),
        "warmup": _or(asked.warmup, 0.1),
        "max_tokens": max_tokens,
        "save_every": _or(asked.save_every, min(steps, 500)),
        "beta": _or(asked.beta, 0.1),
        "dtype": dtype,
        "seed": seed % 2**32,
    } | (
        {}
        if head is None
        else {
            "head": asdict(head),
            "labels": list(head.labels),
            "head_reads": head.reads,
            "head_activation": head.activation or "none",
        }
    )


def plan_from_job(resolved: dict[str, Any], reports: tuple[str, ...] = ()) -> Plan:
    """The run of a job; `resolved` as `resolve` gives it."""
    lora = None
    if resolved["lora_rank"]:
        targets = resolved["lora_targets"]
        lora = LoraPlan(
            resolved["lora_rank"],
            resolved["lora_alpha"],
            targets=None if targets is None else tuple(targets),
        )
    head = resolved.get("head")
    return Plan(
        head=None if head is None else HeadPlan(**{**head, "labels": tuple(head["labels"])}),
        adapter=AdapterPlan(
            kind=resolved["kind"],
            rank=resolved["rank"],
            layers=None if resolved["layers"] == "all" else tuple(sorted(set(resolved["layers"]))),
            rule=PositionRule(resolved["positions"], resolved["tied"]),
            activation=resolved["activation"],
            dropout=resolved["dropout"],
        ),
        lora=lora,
        method=resolved["method"],
        dpo_beta=resolved["beta"],
        epochs=float(resolved["n_epochs"]),
        batch=-(-resolved["batch_size"] // resolved["accumulation"]),
        accumulate=resolved["accumulation"],
        learning_rate=resolved["learning_rate"],
        schedule=resolved["schedule"],
        warmup=resolved["warmup"],
        dtype=resolved["dtype"],
        seed=resolved["seed"],
        save_every=resolved["save_every"],
        report_to=reports,
    )


def _or(asked: Any, chosen: Any) -> Any:
    return chosen if asked == "auto" else asked


def _batch(examples: int) -> int:
    return next((size for size, most in ((4, 64), (8, 512), (16, 4096)) if examples < most), 32)
