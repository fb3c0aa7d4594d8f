"""Random work for the prefix cache: a few adapters, and several waves of requests.

Prompts share stems with each other or go on from an earlier request's prompt and answer; base
requests, salts and strengths are mixed in, in any order.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.directory import publish
from reft_serve.adapters.manifest import InterventionSpec, Manifest, Part
from reft_serve.interventions.positions import PositionRule
from reft_serve.interventions.vocabulary import COMPONENTS, KINDS, has_activation
from tests.support.interventions.edit_cases import random_weights
from tests.support.paths import GOLDEN

CONTEXT, WIDTH, LAYERS, MAX_RANK = 256, 64, 4, 8
LONGEST_ANSWER = 40
STEMS = tuple(tuple(random.Random(seed).choices(range(3, 300), k=CONTEXT)) for seed in range(2))

_phases = st.sampled_from(["prompt", "prompt", "all", "generated"])
RULES = st.one_of(
    st.builds(
        PositionRule,
        st.sampled_from(
            [
                "f1",
                "l1",
                "l5",
                "f3+l3",
                "f7+l7",
                "f40",
                "l40",
                "f33+l2",
                "first",
                "last",
                "0,31,-1,-33",
            ]
        ),
        last_offset=st.sampled_from([0, 0, 1, 3]),
        phase=_phases,
    ),
    st.builds(PositionRule, st.just("all"), phase=_phases),
    st.builds(
        PositionRule,
        st.sampled_from(["f1+l1", "f5+l2", "f7+l7", "f2+l40"]),
        tied=st.just(False),
        last_offset=st.sampled_from([0, 1]),
    ),
)


@dataclass(frozen=True)
class Recipe:
    """An adapter to be written."""

    rule: PositionRule
    specs: tuple[InterventionSpec, ...]
    seed: int

    def write(self, path: Path) -> str:
        """Publish it and return its digest."""
        weights = [
            random_weights(spec.kind, WIDTH, spec.rank, spec.activation, self.seed + k)
            for k, spec in enumerate(self.specs)
        ]
        base = read_base_model(GOLDEN / "models" / "tiny-llama")
        return publish(
            path, Manifest(base_model=base, interventions=self.specs, positions=self.rule), weights
        ).digest


@dataclass(frozen=True)
class Ask:
    """One request.

    adapter: a number into the work's adapters, or -1 for the base. None goes on as `follows` was
    asked: the same adapter,
        strength and salt.
    follows: an earlier wave's request (a number into them all), whose prompt and answer this prompt
    starts with. end: the part of the tokens that is the prompt for the position rule, the rest
    being an answer to score; None: all.
    """

    adapter: int | None
    stem: int
    length: int
    follows: int | None
    salt: str | None
    strength: float
    max_tokens: int
    end: float | None


@dataclass(frozen=True)
class Work:
    recipes: tuple[Recipe, ...]
    waves: tuple[tuple[Ask, ...], ...]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    rule = draw(RULES)
    places = st.tuples(st.integers(0, LAYERS - 1), st.sampled_from(COMPONENTS))
    specs = []
    for layer, component in draw(st.lists(places, min_size=1, max_size=4, unique=True)):
        kind = draw(st.sampled_from(KINDS))
        activation = (
            draw(st.sampled_from(["linear", "tanh", "gelu"])) if has_activation(kind) else "linear"
        )
        part: Part = "both" if rule.tied else draw(st.sampled_from(["both", "prefix", "suffix"]))
        rank = draw(st.integers(1, MAX_RANK // 2))
        specs.append(
            InterventionSpec(
                layer=layer,
                component=component,
                kind=kind,
                rank=rank,
                activation=activation,
                part=part,
            )
        )
    return Recipe(rule, tuple(specs), draw(st.integers(0, 1 << 20)))


@st.composite
def works(draw: st.DrawFn, widest: int = 24) -> Work:
    """Up to five waves of up to `widest` requests of up to four adapters."""
    made = [draw(recipes()) for _ in range(draw(st.integers(1, 4)))]
    numbers = st.integers(-1, len(made) - 1)
    asks = st.builds(
        Ask,
        adapter=st.one_of(st.none(), numbers, numbers),
        stem=st.integers(0, len(STEMS) - 1),
        length=st.one_of(st.integers(1, 200), st.sampled_from([33, 40, 52, 64, 65, 96, 97, 160])),
        follows=st.none() | st.integers(0, 4 * widest),
        salt=st.sampled_from([None, None, None, None, "a", "b"]),
        strength=st.sampled_from([1.0, 1.0, 1.0, 1.0, 0.5, 0.5, -1.5, 0.0]),
        max_tokens=st.sampled_from([1, 2, 3, 4, 6, LONGEST_ANSWER]),
        end=st.sampled_from([None, None, None, None, None, None, 0.5, 0.9]),
    )
    sizes = [draw(st.integers(1, widest)) for _ in range(draw(st.integers(1, 5)))]
    return Work(
        tuple(made), tuple(tuple(draw(st.lists(asks, min_size=n, max_size=n))) for n in sizes)
    )
