"""Whether an engine would take what a job is to make: told before hours of training, not at the first use."""

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
    """What an engine would find wrong with the adapter that a job makes of so many rows; None where nothing is."""
    return _layers_misfit(asked, rows, card) or _rank_misfit(asked, rows, card) or _lora_misfit(asked, card)


def _layers_misfit(asked: Hyperparameters, rows: int, card: EngineCard) -> Infeasible | None:
    shape, depth = asked.shape(rows, card.base.hidden_size), card.base.num_hidden_layers
    layers = range(depth) if shape["layers"] == "all" else sorted(set(shape["layers"]))
    if layers[-1] >= depth:
        return Infeasible("layers", f"the base model has layers 0 to {depth - 1}, and no layer {layers[-1]}")
    halves, most = 1 if shape["tied"] else 2, card.limits.max_interventions
    if most is not None and len(layers) * halves > most:
        twice = " (two at each layer, as they are not tied)" if halves == 2 else ""
        fewer = f"give at most {most // halves} layers" if most >= halves else "let them be tied"
        return Infeasible(
            "layers",
            f"{len(layers) * halves} interventions{twice} are more than the engines here serve: {fewer}, or have "
            "REFT_MAX_INTERVENTIONS raised",
        )
    if card.limits.components is not None and "block_output" not in card.limits.components:
        return Infeasible(
            "layers",
            "the engines here edit no layer's output, which is what jobs train: have block put into REFT_COMPONENTS",
        )
    return None


def _rank_misfit(asked: Hyperparameters, rows: int, card: EngineCard) -> Infeasible | None:
    shape, width = asked.shape(rows, card.base.hidden_size), card.base.hidden_size
    rank: int = shape["rank"]
    each = unit_rank(shape["kind"], 1, shape["activation"])
    if rank > width:
        return Infeasible("rank", f"rank {rank} is larger than the base model's hidden size: give at most {width}")
    if (most := card.limits.max_rank) is not None and rank * each > most:
        chosen = f"rank {rank}" if asked.rank != "auto" else f'rank {rank}, which "auto" is for {rows} rows,'
        twice = f" with the activation {shape['activation']}, which takes twice the room," if each == 2 else ""
        less = f"give at most {most // each}" if most >= each else "let the activation be linear"
        return Infeasible(
            "rank", f"{chosen}{twice} is more than the engines here serve: {less}, or have REFT_MAX_RANK raised"
        )
    return None


def _lora_misfit(asked: Hyperparameters, card: EngineCard) -> Infeasible | None:
    rank = 0 if asked.lora_rank == "auto" else asked.lora_rank
    if rank <= card.max_lora_rank:
        return None
    if not card.max_lora_rank:
        return Infeasible(
            "lora_rank", "the engines here serve no LoRA beside ReFT: leave it out, or have REFT_LORA set to on"
        )
    return Infeasible(
        "lora_rank",
        f"a LoRA of rank {rank} is more than the engines here serve: give at most {card.max_lora_rank}, or have "
        "--max-lora-rank raised",
    )
