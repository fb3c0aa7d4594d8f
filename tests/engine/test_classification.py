"""Adapters with heads of their own, mixed in one batch, answer what Hugging Face with hooks and their head answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reft_serve.adapters.importers.detection import import_adapter
from tests.support.adapters.saves import named
from tests.support.engine.classifier_models import (
    BASES,
    LAYERS,
    WIDTH,
    Base,
    Classifier,
    make_classifiers,
    reference_logits,
    reference_scores,
)
from tests.support.engine.classifier_process import Asked, classify_all
from tests.support.engine.engine_process import engine_process
from tests.support.paths import GOLDEN, ROOT

TEXTS = [[1, 2], [1, *range(10, 12), 2], [1, *range(20, 33), 2], [1, *range(40, 100), 2]]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def engines() -> Iterator[Executor]:
    with engine_process() as process:
        yield process


@pytest.mark.parametrize("name", BASES)
def test_heads_answer_as_hugging_face_does(name: str, tmp_path: Path, engines: Executor) -> None:
    base, folder = BASES[name], tmp_path / "model"
    base.build(folder)
    check_mixed(
        base, folder, make_classifiers(tmp_path, folder, base.reads, 16, WIDTH, LAYERS), engines
    )


@pytest.mark.real
def test_heads_answer_on_minilm(tmp_path: Path, engines: Executor) -> None:
    fetched = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "models.py"), "minilm"],
        capture_output=True,
        text=True,
        check=False,
    )
    if "pip cannot download" in fetched.stderr:
        pytest.skip(fetched.stderr.strip().splitlines()[-1])
    folder = Path(fetched.stdout.strip())
    check_mixed(
        BASES["bert"], folder, make_classifiers(tmp_path, folder, "first", 16, 384, 6), engines
    )


def check_mixed(base: Base, folder: Path, made: list[Classifier], engines: Executor) -> None:
    """One batch of 32 with 16 adapters, half of it asking for logits."""
    texts = [TEXTS[k % len(TEXTS)] for k in range(32)]
    pairs = [
        len(text) // 2 if k % 3 == 0 and base.config == "BertConfig" else None
        for k, text in enumerate(texts)
    ]
    asked: list[Asked] = [
        (made[k % 16].path, text, k >= 16, pairs[k]) for k, text in enumerate(texts)
    ]
    answers = engines.submit(classify_all, folder, asked).result()
    trunk, worst = base.trunk(folder), 0.0
    for k, (answer, text) in enumerate(zip(answers, texts, strict=True)):
        classifier = made[k % 16]
        start = pairs[k]
        types = None if start is None else [int(n >= start) for n in range(len(text))]
        logits = reference_logits(trunk, base.layers, classifier, text, types)
        theirs = logits if k >= 16 else reference_scores(logits, classifier.spec.problem_type)
        assert isinstance(answer, torch.Tensor), answer
        off = (answer - theirs).abs().max().item()
        assert off < TOLERANCE, (
            f"request {k}, {classifier.rule}, {classifier.spec}: off by {off:.3g}"
        )
        worst = max(worst, off)
    print(f"{folder.name}: largest difference {worst:.2g}")


def test_pyrefts_classifier_answers_as_pyreft(tmp_path: Path, engines: Executor) -> None:
    save = named("loreft_cls")
    import_adapter(save.path, save.base, tmp_path / "a", save.flags)
    told, vectors = (
        json.loads(save.vectors.with_suffix(".json").read_text()),
        load_file(save.vectors),
    )
    asked: list[Asked] = [
        (tmp_path / "a", prompt["token_ids"], True, None) for prompt in told["prompts"]
    ]
    answers = engines.submit(classify_all, GOLDEN / told["model"], asked).result()
    for k, answer in enumerate(answers):
        assert isinstance(answer, torch.Tensor), answer
        torch.testing.assert_close(
            answer, vectors[f"logits/{k}"].double().flatten(), rtol=0, atol=TOLERANCE
        )


def test_what_cannot_be_classified_is_told(tmp_path: Path, engines: Executor) -> None:
    base, folder = BASES["llama"], tmp_path / "model"
    base.build(folder)
    (good,) = make_classifiers(tmp_path / "good", folder, "last", 1, WIDTH, LAYERS)
    (first,) = make_classifiers(tmp_path / "first", folder, "first", 1, WIDTH, LAYERS)
    for name in ("damaged", "NaN", "unnamed"):
        shutil.copytree(good.path, tmp_path / name)
    config = json.loads((tmp_path / "unnamed" / "reft_config.json").read_text())
    del config["head"]["labels"]
    (tmp_path / "unnamed" / "reft_config.json").write_text(json.dumps(config))
    held = load_file(tmp_path / "NaN" / "reft_model.safetensors")
    held["head.out.weight"][0, 0] = torch.nan
    save_file(held, tmp_path / "NaN" / "reft_model.safetensors")
    held = load_file(tmp_path / "damaged" / "reft_model.safetensors")
    held["head.out.weight"] = held["head.out.weight"][:, 1:].clone()
    save_file(held, tmp_path / "damaged" / "reft_model.safetensors")
    asked: list[Asked] = [
        (None, TEXTS[1], False, None),
        (first.path, TEXTS[1], False, None),
        (tmp_path / "damaged", TEXTS[1], False, None),
        (tmp_path / "unnamed", TEXTS[1], False, None),
        (tmp_path / "NaN", TEXTS[1], False, None),
        (good.path, [1] * 500, False, None),
        (good.path, [], False, None),
        (good.path, TEXTS[1], False, None),
    ]
    *refused, answered = engines.submit(classify_all, folder, asked).result()
    told = (
        "the base model has no classifier",
        "a token sees only the tokens before it",
        "must have (2, 64)",
        "head.labels: Field required",
        "head.out.weight holds NaN",
        "128",
        "empty",
    )
    for answer, words in zip(refused, told, strict=True):
        assert isinstance(answer, str)
        assert words in answer
    assert isinstance(answered, torch.Tensor)
