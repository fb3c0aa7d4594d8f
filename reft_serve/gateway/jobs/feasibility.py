"""Feasibility of a job: checks before training that an engine would accept the resulting
adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from reft_serve.adapters.engine_card import EngineCard
from reft_serve.interventions.vocabulary import unit_rank
from reft_serve.recipes.hyperparameters import Hyperparameters

__all__ = ["Infeasible", "why_infeasible"]


@dataclass(frozen=True, slots=True)
class Infeasible:
    """The hyper-parameter that cannot be, and what to do about it."""

    name: str
    sentence: str


def why_infeasible(asked: Hyperparameters, rows: int, card: EngineCard) -> Infeasible | None:
    """The fault that an engine would find in the adapter of a job with this many rows; None if
    there is none.
    """
    return (
        _layers_misfit(asked, rows, card)
        or _rank_misfit(asked, rows, card)
        or _lora_misfit(asked, card)
    )


def _layers_misfit(asked: Hyperparameters, rows: int, card: EngineCard) -> Infeasible | None:
    shape = asked.shape(rows, card.base.hidden_size)
    depth = card.base.num_hidden_layers
    layers = range(depth) if shape["layers"] == "all" else sorted(set(shape["layers"]))
    if layers[-1] >= depth:
        return Infeasible("layers", f"the base model has layers 0 to {depth - 1}, not {layers[-1]}")
    halves = 1 if shape["tied"] else 2
    most = card.limits.max_interventions
    if most is not None and len(layers) * halves > most:
        twice = " (two per layer, because tied is false)" if halves == 2 else ""
        fewer = f"use at most {most // halves} layers" if most >= halves else "set tied to true"
        return Infeasible(
            "layers",
            f"{len(layers) * halves} interventions{twice} are more than the engines support: "
            f"{fewer}, or ask the operator to raise REFT_MAX_INTERVENTIONS",
        )
    if card.limits.components is not None and "block_output" not in card.limits.components:
        return Infeasible(
            "layers",
            "jobs train edits of layer outputs, which the engines do not support: the operator "
            "must add block to REFT_COMPONENTS",
        )
    return None


def _rank_misfit(asked: Hyperparameters, rows: int, card: EngineCard) -> Infeasible | None:
    shape = asked.shape(rows, card.base.hidden_size)
    width = card.base.hidden_size
    rank: int = shape["rank"]
    each = unit_rank(shape["kind"], 1, shape["activation"])
    if rank > width:
        return Infeasible(
            "rank", f"rank {rank} is larger than the base model's hidden size: use at most {width}"
        )
    if (most := card.limits.max_rank) is not None and rank * each > most:
        chosen = (
            f"rank {rank}"
            if asked.rank != "auto"
            else f'rank {rank}, which "auto" means for {rows} rows,'
        )
        twice = (
            f" with the activation {shape['activation']}, which takes twice the rank,"
            if each == 2
            else ""
        )
        less = f"use at most {most // each}" if most >= each else "set activation to linear"
        return Infeasible(
            "rank",
            f"{chosen}{twice} is more than the engines support: {less}, or ask the operator to "
            "raise REFT_MAX_RANK",
        )
    return None


def _lora_misfit(asked: Hyperparameters, card: EngineCard) -> Infeasible | None:
    rank = 0 if asked.lora_rank == "auto" else asked.lora_rank
    if rank <= card.max_lora_rank:
        return None
    if not card.max_lora_rank:
        return Infeasible(
            "lora_rank",
            "the engines do not serve LoRA together with ReFT: leave out lora_rank, or ask the "
            "operator to set REFT_LORA=on",
        )
    return Infeasible(
        "lora_rank",
        f"a LoRA of rank {rank} is more than the engines support: use at most "
        f"{card.max_lora_rank}, or ask the --max-lora-rank raised",
    )
