"""The running server: every kind of damage gets its sentence, and the others go on being served."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import save_file

from reft_serve.adapters.engine_card import read_card
from reft_serve.interventions.vocabulary import COMPONENTS
from tests.support.adapters.damage import DAMAGE, MAX_RANK, Damage, write_good
from tests.support.adapters.loras import write_lora
from tests.support.engine.server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def answer(client: openai.OpenAI, model: str) -> str:
    prompt = [1, *range(20, 50)]
    return (
        client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0)
        .choices[0]
        .text
    )


@pytest.fixture(scope="module")
def good_answer(client: openai.OpenAI) -> str:
    text = answer(client, "good")
    assert text != answer(client, "base")
    return text


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.name)
def test_damage_gets_its_sentence_and_the_server_goes_on(
    server: Server, client: openai.OpenAI, good_answer: str, damage: Damage, tmp_path: Path
) -> None:
    path = tmp_path / "adapter"
    write_good(path)
    damage.apply(path)
    status, body = server.load("damaged", path)
    assert status == 400, body
    error = body["error"]
    assert (damage.engine or damage.phrase) in error["message"]
    assert set(error) >= {"message", "type", "param", "code"}
    with pytest.raises(openai.NotFoundError):
        answer(client, "damaged")
    assert answer(client, "good") == good_answer


def test_the_models_card_says_which_adapters_are_taken(client: openai.OpenAI) -> None:
    cards = {model.id: read_card(model.model_dump()) for model in client.models.list()}
    told = cards.pop("base")
    assert told is not None
    assert (told.base.hidden_size, told.base.num_hidden_layers) == (64, 4)
    assert (told.limits.max_rank, told.limits.max_interventions, told.max_lora_rank) == (
        MAX_RANK,
        8,
        16,
    )
    assert told.limits.components == set(COMPONENTS)
    assert set(cards.values()) == {None}


def test_an_adapter_is_loaded_used_and_unloaded_while_others_are_served(
    server: Server, client: openai.OpenAI, good_answer: str, tmp_path: Path
) -> None:
    write_good(tmp_path / "other", seed=7)
    assert server.load("other", tmp_path / "other")[0] == 200
    assert server.load("other", tmp_path / "other")[0] == 400
    other = answer(client, "other")
    assert other not in (good_answer, answer(client, "base"))
    body = json.dumps({"lora_name": "other"}).encode()
    request = urllib.request.Request(
        f"{server.url}/v1/unload_lora_adapter", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=60).close()
    with pytest.raises(openai.NotFoundError):
        answer(client, "other")
    assert answer(client, "good") == good_answer


def test_files_that_vanish_after_loading_do_not_matter(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    write_good(tmp_path / "gone", seed=9)
    assert server.load("gone", tmp_path / "gone")[0] == 200
    before = answer(client, "gone")
    shutil.rmtree(tmp_path / "gone")
    assert answer(client, "gone") == before


def test_a_reloaded_adapter_is_read_once_and_not_for_every_request(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    write_good(tmp_path / "reloaded", seed=10)
    assert server.load("reloaded", tmp_path / "reloaded")[0] == 200
    first = answer(client, "reloaded")
    shutil.rmtree(tmp_path / "reloaded")
    write_good(tmp_path / "reloaded", seed=11)
    assert server.load("reloaded", tmp_path / "reloaded", again=True)[0] == 200
    second = answer(client, "reloaded")
    assert second != first
    shutil.rmtree(tmp_path / "reloaded")
    assert answer(client, "reloaded") == second


def test_what_would_not_be_edited_right_is_refused(client: openai.OpenAI, good_answer: str) -> None:
    asked: dict[str, Any] = {
        "prompt": [1, *range(20, 50)],
        "max_tokens": 3,
        "extra_body": {"use_beam_search": True},
    }
    with pytest.raises(
        openai.BadRequestError, match="beam search is not supported with a ReFT adapter"
    ):
        client.completions.create(model="good", **asked)
    assert client.completions.create(model="base", **asked).choices[0].text
    with pytest.raises(openai.APIStatusError):  # a generating server has no embeddings
        client.embeddings.create(model="good", input="once")
    assert answer(client, "good") == good_answer


def test_a_lora_of_another_tree_is_the_callers_fault_and_names_every_module(
    server: Server, tmp_path: Path
) -> None:
    """As PEFT names the modules of a model that has a vision tower beside its language model."""
    write_good(tmp_path / "mixed")
    tensors = write_lora(tmp_path / "mixed")
    moved = {
        name.replace("model.layers.", "model.language_model.layers."): held
        for name, held in tensors.items()
    }
    save_file(moved, tmp_path / "mixed" / "adapter_model.safetensors")
    status, answer = server.load("mixed", tmp_path / "mixed")
    assert status == 400, answer
    message = answer["error"]["message"]
    for layer in (1, 2):
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            assert f"model.language_model.layers.{layer}.{module}" in message
    assert message.startswith(f"adapter {tmp_path / 'mixed'} cannot be used: its LoRA is for ")
