"""The facts of a base model that its adapters must match, read from its `config.json`. No torch, no
transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from reft_serve.adapters.manifest import BaseFacts
from reft_serve.errors import AdapterInvalid, BaseModelInvalid
from reft_serve.storage.files import read_regular_file

__all__ = ["base_facts", "read_base_model"]

_CONFIG = "config.json"
_MAX_CONFIG_BYTES = 4 << 20
# Families name the same facts differently: Llama, GPT-2 and MPT in turn, GPT-Neo or DistilBERT
# last.
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def read_base_model(path: Path) -> BaseFacts:
    """Read `config.json` of a base model's directory.

    Raises:
        BaseModelInvalid: there is none, it is not JSON, or it lacks the architecture, the hidden
            size or the layers.
    """
    if not path.is_dir():
        raise BaseModelInvalid(
            f"--base {path} is not a directory: give the local directory of the base model"
        )
    file = path / _CONFIG
    if not file.is_file():
        raise BaseModelInvalid(
            f"--base {path} holds no {_CONFIG}, so it is not a base model's directory"
        )
    try:
        # Hub caches hold links, so here a link is followed.
        config = json.loads(read_regular_file(file.resolve(), _MAX_CONFIG_BYTES, str(path)))
    except AdapterInvalid as exc:
        raise BaseModelInvalid(
            f"the base model at {path} cannot be read: {'; '.join(exc.faults)}"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise BaseModelInvalid(f"{file} is not JSON: {str(exc)[:200]}") from exc
    if not isinstance(config, dict):
        raise BaseModelInvalid(f"{file} is not a JSON object")
    return base_facts(config, path.resolve().name)


def base_facts(config: Mapping[str, object], name: str) -> BaseFacts:
    """The facts in a transformers configuration; `name` is for people.

    Raises:
        BaseModelInvalid: a fact is missing or is not of its type.
    """
    nested = config.get("text_config")
    text: Mapping[str, object] = nested if isinstance(nested, Mapping) else config
    architectures = config.get("architectures")
    facts = {
        "architecture": architectures[0]
        if isinstance(architectures, list) and architectures
        else None,
        "hidden_size": next((text[key] for key in _WIDTH if text.get(key) is not None), None),
        "num_hidden_layers": next(
            (text[key] for key in _LAYERS if text.get(key) is not None), None
        ),
    }
    missing = [fact for fact, value in facts.items() if value is None]
    if missing:
        raise BaseModelInvalid(
            f"{_CONFIG} of the base model {name} does not give its {' or '.join(missing)}"
        )
    try:
        return BaseFacts.model_validate({"name": name, **facts})
    except ValidationError as exc:
        wrong = "; ".join(f"{error['loc'][0]}: {error['msg']}" for error in exc.errors())
        raise BaseModelInvalid(
            f"{_CONFIG} of the base model {name} cannot be used: {wrong}"
        ) from exc
