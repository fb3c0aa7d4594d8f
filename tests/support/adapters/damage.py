"""Kinds of damage to a good adapter, each with the sentence it must be answered with.

`write_good` makes the adapter, for tests/golden/models/tiny-llama; each `Damage.apply` spoils the
directory in place. The sentences are those of a reader that knows the base model, takes ranks up to
MAX_RANK and files up to MAX_BYTES.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.directory import CONFIG, TENSORS, Adapter, publish
from reft_serve.adapters.lora import CONFIG as LORA_CONFIG
from reft_serve.adapters.lora import TENSORS as LORA_TENSORS
from reft_serve.adapters.manifest import InterventionSpec, Manifest
from reft_serve.interventions.kinds import Weights
from reft_serve.interventions.positions import PositionRule
from tests.support.adapters.loras import write_lora
from tests.support.paths import GOLDEN

MODEL = GOLDEN / "models" / "tiny-llama"
MAX_RANK = 8
MAX_BYTES = 1 << 20


class Damage(NamedTuple):
    name: str
    apply: Callable[[Path], object]
    phrase: str
    # what an engine reports, if it refuses the manifest before it reads a tensor
    engine: str | None = None


def write_good(path: Path, seed: int = 0) -> Adapter:
    """A sound adapter: loreft at layer 1 and, with an activation, noreft at layer 2; f2+l2."""
    random = torch.Generator().manual_seed(seed)
    R = torch.linalg.qr(torch.randn(64, 4, generator=random))[0].mT
    W, W2, source = (torch.randn(4, 64, generator=random) for _ in range(3))
    b = torch.randn(4, generator=random)
    specs = (
        InterventionSpec(layer=1, component="block_output", kind="loreft", rank=4),
        InterventionSpec(layer=2, component="mlp_output", kind="noreft", rank=4, activation="relu"),
    )
    weights = [
        Weights("loreft", b, R=R, W=W),
        Weights("noreft", b, W=source, W2=W2, b2=b + 1, activation="relu"),
    ]
    rule = PositionRule("f2+l2")
    return publish(
        path,
        Manifest(base_model=read_base_model(MODEL), interventions=specs, positions=rule),
        weights,
    )


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        config = json.loads((path / CONFIG).read_text())
        change(config)
        (path / CONFIG).write_text(json.dumps(config))

    return apply


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        tensors = load_file(path / TENSORS)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / TENSORS)

    return apply


def _tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], object]:
    return _tensors(lambda held: held.update({name: change(held[name])}))


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: (path / TENSORS).write_bytes(change((path / TENSORS).read_bytes()))


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def rewrite(content: bytes) -> bytes:
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return _bytes(rewrite)


def _text(text: str) -> Callable[[Path], object]:
    return lambda path: (path / CONFIG).write_text(text)


def _replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return apply


def _linked(name: str) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        target = path.parent / f"{path.name}.{name}"
        (path / name).rename(target)
        (path / name).symlink_to(target)

    return apply


def _poked(value: float) -> Callable[[Tensor], Tensor]:
    def poke(tensor: Tensor) -> Tensor:
        tensor.view(-1)[7] = value
        return tensor

    return poke


def _spec(**fields: object) -> Callable[[Path], object]:
    return _config(lambda config: config["interventions"][0].update(fields))


def _positions(**fields: object) -> Callable[[Path], object]:
    return _config(lambda config: config["positions"].update(fields))


def _base(**fields: object) -> Callable[[Path], object]:
    return _config(lambda config: config["base_model"].update(fields))


def _only_loreft(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        _config(lambda config: config["interventions"].pop())(path)
        _tensors(
            lambda held: [
                held.pop(name) for name in list(held) if name.startswith("interventions.1.")
            ]
        )(path)
        _tensors(change)(path)

    return apply


def _no_effect(held: dict[str, Tensor]) -> None:
    held["interventions.0.W"] = held["interventions.0.R"].clone()
    held["interventions.0.b"] = torch.zeros(4)


def _repeated(path: Path) -> None:
    _config(lambda config: config.update(interventions=[config["interventions"][0]] * 5))(path)
    held = load_file(path / TENSORS)
    first = {name: held[f"interventions.0.{name}"] for name in ("R", "W", "b")}
    save_file(
        {f"interventions.{k}.{n}": t.clone() for k in range(5) for n, t in first.items()},
        path / TENSORS,
    )


def _wide(path: Path) -> None:
    _spec(rank=9)(path)
    wide = {"R": torch.eye(64)[:9], "W": torch.ones(9, 64), "b": torch.ones(9)}
    _tensors(
        lambda held: held.update(
            {f"interventions.0.{name}": tensor for name, tensor in wide.items()}
        )
    )(path)


def _infinite(path: Path) -> None:
    text = (path / CONFIG).read_text()
    (path / CONFIG).write_text(text.replace('"provenance": {}', '"provenance": {"loss": 1e999}'))


def _overlap(header: dict[str, Any]) -> None:
    header["interventions.0.W"]["data_offsets"] = header["interventions.0.R"]["data_offsets"]


def _damaged(name: str, apply: Callable[[Path], object]) -> Damage:
    return Damage(name, apply, f"{TENSORS} is damaged or not a safetensors file")


def _beside(change: Callable[[Path], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        write_lora(path)
        change(path)

    return apply


def _lora_linked(path: Path) -> None:
    (path / LORA_TENSORS).unlink()
    (path / LORA_TENSORS).symlink_to(path / TENSORS)


def _lora_text(text: str) -> Callable[[Path], object]:
    return _beside(lambda path: (path / LORA_CONFIG).write_text(text))


def _lora_config(**fields: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        (path / LORA_CONFIG).write_text(
            json.dumps(json.loads((path / LORA_CONFIG).read_text()) | fields)
        )

    return _beside(change)


def _lora_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        tensors = load_file(path / LORA_TENSORS)
        change(tensors)
        save_file(tensors, path / LORA_TENSORS)

    return _beside(spoil)


_O = "base_model.model.model.layers.1.self_attn.o_proj.lora_"


def _elsewhere(tensors: dict[str, Tensor]) -> None:
    for half in ("A.weight", "B.weight"):
        tensors[_O.replace(".1.", ".9.") + half] = tensors[_O + half].clone()


FILES = [
    Damage("no tensor file", lambda path: (path / TENSORS).unlink(), f"{TENSORS} is missing"),
    Damage("tensor file is a link", _linked(TENSORS), f"{TENSORS} is a symbolic link"),
    Damage("configuration is a link", _linked(CONFIG), f"{CONFIG} is a symbolic link"),
    Damage(
        "tensor file is a directory",
        _replaced(TENSORS, Path.mkdir),
        f"{TENSORS} is not a regular file",
    ),
    Damage(
        "configuration is a directory",
        _replaced(CONFIG, Path.mkdir),
        f"{CONFIG} is not a regular file",
    ),
    Damage(
        "tensor file is a pipe", _replaced(TENSORS, os.mkfifo), f"{TENSORS} is not a regular file"
    ),
    Damage(
        "configuration is a pipe", _replaced(CONFIG, os.mkfifo), f"{CONFIG} is not a regular file"
    ),
    Damage(
        "tensor file too large",
        lambda path: os.truncate(path / TENSORS, 2 << 20),
        "and at most 1048576 are taken",
    ),
    Damage(
        "configuration too large",
        lambda path: os.truncate(path / CONFIG, 5 << 20),
        "and at most 4194304 are taken",
    ),
]

BYTES = [
    _damaged("tensor file empty", _bytes(lambda content: b"")),
    _damaged("tensor file cut in its length", _bytes(lambda content: content[:5])),
    _damaged("tensor file cut in its header", _bytes(lambda content: content[:40])),
    _damaged("tensor file cut in its data", _bytes(lambda content: content[:-1])),
    _damaged("tensor file cut in half", _bytes(lambda content: content[: len(content) // 2])),
    _damaged("tensor file with a tail", _bytes(lambda content: content + b"tail")),
    _damaged(
        "header longer than the file",
        _bytes(lambda content: struct.pack("<Q", 1 << 40) + content[8:]),
    ),
    _damaged(
        "header shorter than it is", _bytes(lambda content: struct.pack("<Q", 9) + content[8:])
    ),
    _damaged("header not JSON", _bytes(lambda content: content[:8] + b"#" + content[9:])),
    _damaged(
        "header nested too deep",
        _bytes(lambda content: struct.pack("<Q", 1 << 17) + b"[" * (1 << 17)),
    ),
    _damaged("overlapping tensors", _header(_overlap)),
    _damaged(
        "offsets beyond the data",
        _header(lambda h: h["interventions.0.b"].update(data_offsets=[0, 1 << 40])),
    ),
    _damaged("negative shape", _header(lambda h: h["interventions.0.b"].update(shape=[-4]))),
    _damaged("unknown dtype", _header(lambda h: h["interventions.0.b"].update(dtype="F7"))),
    _damaged("a pickle", _bytes(lambda content: b"\x80\x02}q\x00." * 20)),
]

CONTENT = [
    Damage(
        "missing tensor",
        _tensors(lambda t: t.pop("interventions.0.b")),
        "tensor interventions.0.b is missing",
    ),
    Damage(
        "unknown tensor",
        _tensors(lambda t: t.update({"interventions.0.gate\n": torch.ones(1)})),
        r"tensor 'interventions.0.gate\n' of reft_model.safetensors belongs to no intervention",
    ),
    Damage(
        "tensor of no intervention",
        _tensors(lambda t: t.update({"interventions.2.b": torch.ones(4)})),
        "tensor 'interventions.2.b' of reft_model.safetensors belongs to no intervention",
    ),
    Damage(
        "wrong shape",
        _tensor("interventions.0.W", lambda t: t[:3]),
        "W has shape (3, 64) and must have (4, 64)",
    ),
    Damage(
        "transposed",
        _tensor("interventions.0.R", lambda t: t.mT),
        "R has shape (64, 4) and must have (4, 64)",
    ),
    Damage(
        "wrong dtype", _tensor("interventions.0.W", Tensor.half), "W is float16 and must be float32"
    ),
    Damage(
        "R not float32",
        _tensor("interventions.0.R", Tensor.bfloat16),
        "R is bfloat16 and must be float32",
    ),
    Damage("integers", _tensor("interventions.0.b", Tensor.int), "b is int32 and must be float32"),
    Damage("NaN", _tensor("interventions.0.W", _poked(float("nan"))), "W holds NaN or Inf"),
    Damage("Inf", _tensor("interventions.1.b2", lambda t: t / 0), "b2 holds NaN or Inf"),
    Damage("R all zeros", _tensor("interventions.0.R", torch.zeros_like), "R is all zeros"),
    Damage("W2 all zeros", _tensor("interventions.1.W2", torch.zeros_like), "W2 is all zeros"),
    Damage("no effect", _only_loreft(_no_effect), "it has no effect"),
    Damage(
        "rank over the maximum",
        _wide,
        "needs rank 9 and this engine supports 8: raise REFT_MAX_RANK",
    ),
    Damage(
        "rank over the width",
        _spec(rank=65),
        "rank 65 is larger than the hidden size 64",
        engine="needs rank 65",
    ),
    Damage("rank of another tensor", _spec(rank=5), "R has shape (4, 64) and must have (5, 64)"),
    Damage(
        "five edits at one place",
        _repeated,
        "5 interventions act in sequence at block 2 (prefix); at most 4",
    ),
]

MANIFEST = [
    Damage("no JSON", _text("{"), f"{CONFIG} is not JSON"),
    Damage("empty configuration", _text(""), f"{CONFIG} is not JSON"),
    Damage(
        "not UTF-8",
        lambda path: (path / CONFIG).write_bytes(b'{"a": "\xff\xfe\xfa"}'),
        f"{CONFIG} is not JSON",
    ),
    Damage("a list", _text("[]"), "the top level: Input should be an object"),
    Damage("nested too deep", _text('{"a":' * 50_000), f"{CONFIG} is not JSON"),
    Damage("NaN constant", _text('{"format_version": NaN}'), "NaN is not a JSON number"),
    Damage("infinite number", _infinite, "provenance.loss"),
    Damage(
        "wrong version",
        _config(lambda c: c.update(format_version=2)),
        "format_version: Input should be 1, not 2",
    ),
    Damage(
        "unknown field",
        _config(lambda c: c.update(scale=2)),
        "scale: Extra inputs are not permitted",
    ),
    Damage(
        "unknown field with a line break",
        _config(lambda c: c.update({"a\nb": 2})),
        r"a\nb: Extra inputs",
    ),
    Damage("missing field", _config(lambda c: c.pop("positions")), "positions: Field required"),
    Damage("missing base", _config(lambda c: c.pop("base_model")), "base_model: Field required"),
    Damage(
        "no interventions",
        _config(lambda c: c.update(interventions=[])),
        "interventions: Tuple should have at least 1",
    ),
    Damage(
        "bad kind", _spec(kind="reft"), "interventions.0.kind: Input should be 'loreft', 'noreft'"
    ),
    Damage(
        "bad component",
        _spec(component="lm_head"),
        "interventions.0.component: Input should be 'block_output'",
    ),
    Damage(
        "bad activation",
        _spec(activation="softmax"),
        "activation 'softmax' is not one of linear, relu",
    ),
    Damage(
        "activation of a kind without",
        _spec(kind="consreft", activation="relu"),
        "consreft has no activation",
    ),
    Damage("bad dtype", _spec(dtype="int4"), "interventions.0.dtype: Input should be 'float32'"),
    Damage(
        "rank zero",
        _spec(rank=0),
        "interventions.0.rank: Input should be greater than or equal to 1",
    ),
    Damage(
        "rank a string", _spec(rank="4"), "interventions.0.rank: Input should be a valid integer"
    ),
    Damage(
        "negative layer",
        _spec(layer=-1),
        "interventions.0.layer: Input should be greater than or equal to 0",
    ),
    Damage(
        "layer out of range",
        _spec(layer=4),
        "intervention 0 is at layer 4 and the base model has 4 (0 to 3)",
    ),
    Damage("bad positions", _positions(spec="l2+f2"), "positions 'l2+f2' are not understood"),
    Damage("positions of no token", _positions(spec="f0+l0"), "positions 'f0+l0' name no token"),
    Damage(
        "positions not a string",
        _positions(spec=7),
        "positions.spec: Input should be a valid string",
    ),
    Damage("unknown position field", _positions(stride=2), "positions.stride"),
    Damage(
        "bad phase",
        _positions(phase="decode"),
        "positions.phase: Input should be 'prompt', 'all' or 'generated'",
    ),
    Damage("untied without halves", _positions(spec="l2", tied=False), "'l2' cannot be untied"),
    Damage(
        "tied with parts",
        _spec(part="prefix"),
        "intervention 0 serves the prefix only, but the positions are tied",
    ),
    Damage(
        "offset too large", _positions(last_offset=5000), "last_offset must be between 0 and 1024"
    ),
]

BASE = [
    Damage(
        "another architecture",
        _base(architecture="Qwen2ForCausalLM"),
        "it was trained on a Qwen2ForCausalLM",
    ),
    Damage(
        "another width",
        _base(hidden_size=128),
        "R has shape (4, 64) and must have (4, 128)",
        engine="its hidden size is 128 and the base model's is 64",
    ),
    Damage(
        "another depth",
        _base(num_hidden_layers=8),
        "it was trained on 8 layers and the base model has 4",
    ),
    Damage(
        "width zero",
        _base(hidden_size=0),
        "base_model.hidden_size: Input should be greater than or equal to 1",
    ),
]

LORA = [
    Damage(
        "LoRA without its configuration",
        _beside(lambda p: (p / LORA_CONFIG).unlink()),
        f"{LORA_CONFIG} is missing",
    ),
    Damage(
        "LoRA without its tensors",
        _beside(lambda p: (p / LORA_TENSORS).unlink()),
        f"{LORA_TENSORS} is missing",
    ),
    Damage("LoRA that is a link", _beside(_lora_linked), f"{LORA_TENSORS} is a symbolic link"),
    Damage("LoRA configuration not JSON", _lora_text("{"), f"{LORA_CONFIG} is not JSON"),
    Damage("LoRA configuration a list", _lora_text("[]"), f"{LORA_CONFIG} is not a JSON object"),
    Damage("another PEFT method", _lora_config(peft_type="IA3"), "peft_type is 'IA3'"),
    Damage("LoRA rank zero", _lora_config(r=0), "r must be a whole number from 1, and it is 0"),
    Damage(
        "LoRA alpha NaN",
        _lora_config(lora_alpha=float("nan")),
        "lora_alpha must be a number, and it is nan",
    ),
    Damage(
        "LoRA tensors cut",
        _beside(lambda p: os.truncate(p / LORA_TENSORS, 99)),
        f"{LORA_TENSORS} is damaged",
    ),
    Damage("LoRA of no tensors", _lora_tensors(dict.clear), f"{LORA_TENSORS} holds no tensors"),
    Damage(
        "LoRA with NaN",
        _lora_tensors(lambda t: t[_O + "A.weight"].fill_(float("nan"))),
        "must hold finite floats",
    ),
    Damage(
        "half a LoRA",
        _lora_tensors(lambda t: t.pop(_O + "B.weight")),
        "layers.1.self_attn.o_proj' has lora_A alone",
    ),
    Damage(
        "LoRA of two ranks",
        _lora_tensors(lambda t: t.update({_O + "B.weight": torch.ones(64, 4)})),
        "do not meet",
    ),
    Damage(
        "DoRA",
        _lora_tensors(lambda t: t.update({_O + "magnitude": torch.ones(64)})),
        "is not a matrix of a LoRA",
    ),
    Damage(
        "LoRA of a layer too many",
        _lora_tensors(_elsewhere),
        "is for layer 9 and the base model has 4",
    ),
]

DAMAGE = [*FILES, *BYTES, *CONTENT, *MANIFEST, *BASE, *LORA]
