"""Each model family's answers, edited at each of its places, are those of Hugging Face with plain
hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine.engine_process import Answer, Asked, answer_in_rounds, engine_process
from tests.support.engine.family_models import (
    EFFECT,
    FAMILIES,
    PROMPTS,
    Family,
    make_adapters,
    reference_logprobs,
)


def check_against_reference(
    model: Any, family: Family, asked: Sequence[Asked], answers: Sequence[Answer]
) -> float:
    """The largest difference of a log-probability, at any step of any request."""
    worst = 0.0
    for (adapter, prompt), (tokens, ours) in zip(asked, answers, strict=True):
        theirs = reference_logprobs(model, family, adapter, prompt, tokens)[-len(ours) :]
        off = (ours - theirs).abs().max().item()
        where = "base" if adapter is None else adapter.name
        assert off < family.tolerance, f"{where}, prompt of {len(prompt)} tokens: off by {off:.3g}"
        worst = max(worst, off)
        if adapter is not None:
            base = reference_logprobs(model, family, None, prompt, tokens)[-len(ours) :]
            assert (theirs - base).abs().max().item() > EFFECT, (
                f"{where} changes too little to be tested"
            )
    return worst


def check_family(
    name: str, folder: Path, settings: dict[str, str], engines: Executor, **options: Any
) -> float:
    family = FAMILIES[name]
    model = family.build(folder / "model")
    adapters = make_adapters(family, folder / "model", folder / "adapters")
    asked = [(adapter, prompt) for prompt in PROMPTS for adapter in (None, *adapters)]
    rounds = engines.submit(answer_in_rounds, folder / "model", settings, asked, options).result()
    worst = max(check_against_reference(model, family, asked, answers) for answers in rounds)
    print(f"{name}: {len(asked)} requests, largest logprob difference {worst:.2g}")
    return worst


@pytest.fixture(scope="module")
def engines() -> Iterator[Executor]:
    with engine_process() as process:
        yield process


@pytest.mark.parametrize("name", FAMILIES)
def test_edits_are_those_of_hugging_face_with_hooks(
    name: str, tmp_path: Path, engines: Executor
) -> None:
    check_family(name, tmp_path, {"LORA": "off"}, engines)


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        # LoRA's wrappers take the place of the linear layers, of which OPT's last one is an MLP's
        # output itself.
        pytest.param("opt", {"LORA": "on"}, {}, id="opt with LoRA on"),
        # A batch of one around the tokens, so that the edits of the compiled graph are made through
        # views.
        pytest.param("gpt_neox", {"LORA": "off"}, {"enforce_eager": False}, id="gpt_neox compiled"),
    ],
)
def test_edits_hold_where_vllm_changes_the_layers(
    name: str, settings: dict[str, str], options: dict[str, Any], tmp_path: Path, engines: Executor
) -> None:
    check_family(name, tmp_path, settings, engines, **options)
