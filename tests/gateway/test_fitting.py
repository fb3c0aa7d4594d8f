"""A job whose adapter no engine would take is refused when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_serve.adapters.engine_card import EngineCard, read_card
from reft_serve.adapters.manifest import BaseFacts, EngineLimits, InterventionSpec, Manifest, Part
from reft_serve.gateway.jobs.feasibility import why_infeasible
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import KINDS, Component, Kind, has_activation
from reft_serve.recipes.hyperparameters import read_hyperparameters
from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Served, Tenant
from tests.support.gateway.uploads import upload

BASE = BaseFacts(
    name="/models/tiny", architecture="LlamaForCausalLM", hidden_size=24, num_hidden_layers=4
)
CARD = EngineCard(base=BASE, limits=EngineLimits(max_rank=16, max_interventions=6), max_lora_rank=8)
NO_LORA = CARD.model_copy(update={"max_lora_rank": 0})
NARROW = CARD.model_copy(
    update={"limits": EngineLimits(max_rank=4, components=frozenset({"mlp_output"}))}
)
NARROWEST = CARD.model_copy(update={"limits": EngineLimits(max_rank=1, max_interventions=1)})

REFUSED: dict[str, tuple[dict[str, Any], EngineCard, str, str]] = {
    "rank": ({"rank": 17}, CARD, "rank", "rank 17 is more than the engines support: use at most 16"),
    "twice its rank": ({"rank": 9, "activation": "relu"}, CARD, "rank", "relu, which takes twice the rank"),
    "wider than the model": ({"rank": 25}, CARD, "rank", "larger than the base model's hidden size: use at most 24"),
    "auto": ({"layers": [0]}, NARROW.model_copy(update={"limits": EngineLimits(max_rank=4)}), "rank", '"auto" means for 2500 rows'),
    "no such layer": ({"layers": [1, 4]}, CARD, "layers", "layers 0 to 3, not 4"),
    "untied": ({"tied": False, "positions": "f1+l1"}, CARD, "layers", "8 interventions (two per layer"),
    "component": ({"rank": 1}, NARROW, "layers", "add block to REFT_COMPONENTS"),
    "LoRA": ({"lora_rank": 16}, CARD, "lora_rank", "a LoRA of rank 16 is more than the engines support: use at most 8"),
    "no LoRA": ({"lora_rank": 1}, NO_LORA, "lora_rank", "do not serve LoRA together with ReFT"),
    "one untied": ({"layers": [0], "tied": False, "positions": "f1+l1"}, NARROWEST, "layers", "set tied to true"),
    "one bent": ({"layers": [0], "rank": 1, "activation": "relu"}, NARROWEST, "rank", "set activation to linear"),
}  # fmt: skip
TAKEN: dict[str, tuple[dict[str, Any], EngineCard]] = {
    "all auto": ({}, CARD),
    "the most": ({"rank": 16, "lora_rank": 8}, CARD),
    "subtracts nothing": ({"rank": 16, "kind": "direft", "activation": "relu"}, CARD),
    "half": ({"rank": 8, "activation": "relu"}, CARD),
    "three untied": ({"tied": False, "positions": "f1+l1", "layers": [0, 2, 3, 3]}, CARD),
    "no LoRA": ({"lora_rank": 0}, NO_LORA),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_engine_would_refuse_is_told(case: str) -> None:
    asked, card, name, phrase = REFUSED[case]
    found = why_infeasible(read_hyperparameters(asked), 2500, card)
    assert found is not None
    assert found.name == name
    assert phrase in found.sentence


@pytest.mark.parametrize("case", TAKEN)
def test_what_it_would_take_is_not_in_the_way(case: str) -> None:
    asked, card = TAKEN[case]
    assert why_infeasible(read_hyperparameters(asked), 2500, card) is None


@given(
    rank=st.integers(1, 24), layers=st.sets(st.integers(0, 3), min_size=1), tied=st.booleans(), kind=st.sampled_from(KINDS),
    activation=st.sampled_from(["linear", "relu"]), max_rank=st.integers(1, 24), max_interventions=st.integers(1, 8),
    component=st.sampled_from(["block_output", "mlp_output"]),
)  # fmt: skip
def test_what_is_told_is_what_the_engine_finds(
    rank: int, layers: set[int], tied: bool, kind: Kind, activation: str, max_rank: int, max_interventions: int,
    component: Component,
) -> None:  # fmt: skip
    if not has_activation(kind):
        activation = "linear"
    asked = {
        "rank": rank, "layers": sorted(layers), "tied": tied, "positions": "f1+l1", "kind": kind, "activation": activation
    }  # fmt: skip
    parts: tuple[Part, ...] = ("both",) if tied else ("prefix", "suffix")
    specs = tuple(
        InterventionSpec(
            layer=layer,
            component="block_output",
            kind=kind,
            rank=rank,
            activation=activation,
            part=part,
        )
        for layer in layers
        for part in parts
    )
    limits = EngineLimits(
        max_rank=max_rank, max_interventions=max_interventions, components=frozenset({component})
    )
    manifest = Manifest(base_model=BASE, interventions=specs, positions=PositionRule("f1+l1", tied))
    card = CARD.model_copy(update={"limits": limits})
    assert (why_infeasible(read_hyperparameters(asked), 1, card) is None) == (
        limits.faults(manifest, BASE) == []
    )


@pytest.mark.parametrize(
    "card",
    [None, {}, {"reft": None}, {"reft": {"base": 1}}, {"reft": {"limits": {"max_rank": "x"}}}],
)
def test_a_card_that_says_nothing_is_none(card: object) -> None:
    assert read_card(card) is None


@pytest.fixture
def tenant(tmp_path: Path) -> Iterator[Tenant]:
    """Of a gateway over two engines: one that does not tell, and one that does."""
    with ExitStack() as stack:
        urls = []
        for engine in (FakeEngine(), FakeEngine(card=CARD)):
            served = Served(engine.app)
            stack.callback(served.stop)
            urls.append(served.url)
        gateway = Gateway(tmp_path, ",".join(urls))
        stack.callback(gateway.stop)
        yield gateway.tenant("one")


def test_the_job_is_refused_with_the_place_of_what_cannot_be(tenant: Tenant) -> None:
    file = upload(tenant).id

    def asked(**body: Any) -> Any:
        answer = tenant.http.post(
            "/v1/fine_tuning/jobs", json={"model": "base", "training_file": file, **body}
        )
        return answer.status_code, answer.json()

    status, told = asked(
        method={"type": "supervised", "supervised": {"hyperparameters": {"rank": 17}}}
    )
    error = told["error"]
    assert (status, error["type"], error["param"]) == (
        400, "invalid_request_error", "method.supervised.hyperparameters.rank"
    )  # fmt: skip
    assert "use at most 16" in error["message"]
    assert (
        asked(hyperparameters={"lora_rank": 9})[1]["error"]["param"] == "hyperparameters.lora_rank"
    )
    assert tenant.http.get("/v1/fine_tuning/jobs").json()["data"] == []
    assert asked(hyperparameters={"rank": 16, "lora_rank": 8})[0] == 200
