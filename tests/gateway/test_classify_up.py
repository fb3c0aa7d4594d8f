"""A classifier trained and served end to end through `up`, with the `openai` client and `httpx`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save

from tests.support.engine.classifier_models import make_classifiers
from tests.support.gateway.up_process import Up
from tests.support.training.classifiers import rows_of, tiny_bert


def _label(words: list[str]) -> str:
    return "praise" if "good" in words or "fine" in words else "other"


@pytest.mark.alone
def test_a_classifier_is_trained_and_served(tmp_path: Path) -> None:
    up = Up(tmp_path, model=tiny_bert(tmp_path / "bert", heads=1))
    try:
        with rows_of(tmp_path / "rows.jsonl", _label, count=128).open("rb") as data:
            file = up.openai.files.create(file=data, purpose="fine-tune")
        settings: dict[str, Any] = {"n_epochs": 25, "batch_size": 16, "learning_rate": 0.01}
        job = up.openai.fine_tuning.jobs.create(
            model="base",
            training_file=file.id,
            validation_file=file.id,
            method={"type": "classification", "classification": {"hyperparameters": settings}},  # type: ignore[arg-type, typeddict-item]
            suffix="praise",
        )
        begun = time.monotonic()
        while job.status not in ("succeeded", "failed") and time.monotonic() < begun + 120:
            time.sleep(0.5)
            job = up.openai.with_options(max_retries=2).fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error
        rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        texts = [row["text"] for row in rows]
        answer = up.http.post(
            "/v1/classify", json={"model": job.fine_tuned_model, "input": texts}
        ).json()
        right = [
            found["label"] == row["label"] for found, row in zip(answer["data"], rows, strict=True)
        ]
        assert sum(right) >= 0.95 * len(rows), sum(right)
        assert answer["model"] == job.fine_tuned_model
        assert all(sum(each["probs"]) == pytest.approx(1, abs=1e-5) for each in answer["data"])
        embedded = up.openai.embeddings.create(model=job.fine_tuned_model or "", input=texts)
        plain = up.openai.embeddings.create(model="base", input=texts)
        assert len(embedded.data[0].embedding) == len(plain.data[0].embedding) == 32
        assert embedded.data[0].embedding != plain.data[0].embedding
        _refuses_requests(up, job.fine_tuned_model or "")
        _refuses_adapters(up, tmp_path)
        again = up.http.post("/v1/classify", json={"model": job.fine_tuned_model, "input": texts})
        labels = [[each["label"] for each in found["data"]] for found in (again.json(), answer)]
        assert labels[0] == labels[1]
        used = up.http.get("/v1/usage", params={"group_by": "endpoint"}).json()["data"]
        assert {each["group"]["endpoint"] for each in used} >= {"classify", "embeddings"}
    finally:
        up.stop()


def _refuses_requests(up: Up, name: str) -> None:
    for model, text, told in (
        ("base", "good", "the base model has no classifier"),
        (name, "cat " * 200, "64"),
    ):
        refused = up.http.post("/v1/classify", json={"model": model, "input": text})
        assert refused.status_code == 400, refused.text
        assert told in refused.json()["error"]["message"]
    pair = up.http.post(
        "/v1/classify", json={"model": name, "input": "the cat", "text_pair": "is good"}
    )
    assert pair.status_code == 200, pair.text
    empty = up.http.post("/v1/classify", json={"model": name, "input": ""})
    assert empty.status_code in (200, 400), empty.text
    many = up.http.post("/v1/classify", json={"model": name, "input": ["good"] * 2048})
    assert many.status_code == 200, many.text
    assert len(many.json()["data"]) == 2048


def _refuses_adapters(up: Up, folder: Path) -> None:
    """Heads that are damaged, or whose scores overflow: each a sentence, and the engine stays."""
    (made,) = make_classifiers(folder, folder / "bert", "first", 1, 32, 2)
    held = load_file(made.path / "reft_model.safetensors")
    out = held["head.out.weight"]
    for number, (weight, told) in enumerate(
        {
            "NaN": (torch.full_like(out, torch.nan), "head.out.weight holds NaN or Inf"),
            "narrow": (out[:, 1:].clone(), "has shape (2, 31) and must have (2, 32)"),
        }.values()
    ):
        refused = _upload(up, made.path, f"damaged-{number}", held | {"head.out.weight": weight})
        assert refused.status_code == 400, refused.text
        assert told in refused.json()["error"]["message"]
    bias = torch.full_like(held["head.dense.bias"], 1e6)  # so that tanh is 1
    huge = held | {"head.out.weight": torch.full_like(out, 3e38), "head.dense.bias": bias}
    assert _upload(up, made.path, "huge", huge).status_code == 201
    for _ in range(3):
        refused = up.http.post("/v1/classify", json={"model": "huge", "input": "the cat"})
        assert refused.status_code == 400, refused.text
        assert "not finite" in refused.json()["error"]["message"]


def _upload(up: Up, path: Path, name: str, tensors: dict[str, torch.Tensor]) -> httpx.Response:
    files = [
        ("files", ("reft_config.json", (path / "reft_config.json").read_bytes())),
        ("files", ("reft_model.safetensors", save(tensors))),
    ]
    return up.http.post("/v1/adapters", data={"name": name}, files=files)
