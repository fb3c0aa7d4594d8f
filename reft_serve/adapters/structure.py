"""Checks of an adapter's files that need no torch: the manifest, and each tensor's name, shape,
dtype and extent.

`directory` and `lora`, which the engine calls when it loads a version, add the checks that need the
values: NaN, zeros, and edits without effect.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from reft_serve.adapters.head import HEAD_PREFIX, head_faults
from reft_serve.adapters.header import Entry, read_header
from reft_serve.adapters.manifest import InterventionSpec, Manifest, parse_manifest
from reft_serve.errors import AdapterInvalid
from reft_serve.interventions.vocabulary import optional_tensors, required_tensors
from reft_serve.storage.files import read_regular_file

__all__ = [
    "CONFIG",
    "FILES",
    "LORA_CONFIG",
    "LORA_NAME",
    "LORA_TENSORS",
    "MAX_CONFIG_BYTES",
    "MAX_TARGETS",
    "TENSORS",
    "check_structure",
    "lora_faults",
    "module_faults",
    "tensor_faults",
    "unknown_modules",
]

CONFIG = "reft_config.json"
TENSORS = "reft_model.safetensors"
LORA_CONFIG = "adapter_config.json"
LORA_TENSORS = "adapter_model.safetensors"
FILES = (CONFIG, TENSORS, LORA_CONFIG, LORA_TENSORS)
MAX_CONFIG_BYTES = 4 << 20
MAX_TARGETS = 512
"""Number of targeted modules that are compared with the tensors."""
LORA_NAME = re.compile(r"base_model\.model\.(.{1,512})\.lora_([AB])\.weight")
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d{1,6})\.")
_MOST_RANK = 1 << 24
_LONGEST_TARGET = 16
_NAMED_CHARACTERS = 2500
_FAULT_CHARACTERS = 300
# What PEFT's LoRAs may have that vLLM's do not, each with what it is.
_UNSERVED = {
    "use_dora": "DoRA's magnitudes are",
    "bias": "trained biases are",
    "lora_bias": "biases of the LoRA are",
    "modules_to_save": "other modules that were trained are",
    "rank_pattern": "ranks by module are",
    "alpha_pattern": "scales by module are",
    "layer_replication": "repeated layers are",
    "trainable_token_indices": "trained embeddings are",
}
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


def check_structure(path: Path, where: str) -> Manifest:
    """Check the files of a directory and give its manifest.

    Args:
        path: the directory, with some of FILES in it.
        where: what messages call the adapter.

    Raises:
        AdapterInvalid: every fault found.
    """
    present = {file.name for file in path.iterdir()}
    halves = FILES if present & {LORA_CONFIG, LORA_TENSORS} else (CONFIG, TENSORS)
    faults = [f"{name} is missing" for name in halves if name not in present]
    if faults:
        raise AdapterInvalid(where, faults)
    manifest = parse_manifest(read_regular_file(path / CONFIG, MAX_CONFIG_BYTES, where), where)
    faults = [fault for _, fault in tensor_faults(manifest, read_header(path / TENSORS, where))]
    if LORA_TENSORS in present:
        config = read_regular_file(path / LORA_CONFIG, MAX_CONFIG_BYTES, where)
        faults += lora_faults(
            config, read_header(path / LORA_TENSORS, where), manifest.base_model.num_hidden_layers
        )
    if faults:
        raise AdapterInvalid(where, faults)
    return manifest


def tensor_faults(manifest: Manifest, entries: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
    """The faults of an adapter's tensors: (the tensor's name, what is wrong with it)."""
    width = manifest.base_model.hidden_size
    expected = {}
    for k, spec in enumerate(manifest.interventions):
        for letter in (*required_tensors(spec.kind), *optional_tensors(spec.kind)):
            expected[f"interventions.{k}.{letter}"] = k, spec, letter
        for letter in required_tensors(spec.kind):
            name = f"interventions.{k}.{letter}"
            if name not in entries:
                yield name, f"tensor {name} is missing from {TENSORS}"
    yield from head_faults(manifest.head, width, entries)
    for name, entry in sorted(entries.items()):
        if name.startswith(HEAD_PREFIX):
            continue
        if name not in expected:
            yield name, f"tensor {name[:80]!r} of {TENSORS} belongs to no intervention of {CONFIG}"
            continue
        k, spec, letter = expected[name]
        fault = _entry_fault(entry, spec, letter, width)
        if fault is not None:
            yield name, f"intervention {k} ({spec.where}): {fault}"


def _entry_fault(entry: Entry, spec: InterventionSpec, letter: str, width: int) -> str | None:
    shape = (spec.rank,) if letter in ("b", "b2") else (spec.rank, width)
    kept_full = letter == "R" or (letter == "b" and "W" not in required_tensors(spec.kind))
    dtype = "float32" if kept_full else spec.dtype
    if spec.rank > width:  # told once
        return (
            f"rank {spec.rank} is larger than the hidden size {width}"
            if letter in ("R", "W2")
            else None
        )
    if entry.shape != shape:
        return f"{letter} has shape {entry.shape} and must have {shape}"
    if entry.dtype != dtype:
        return f"{letter} is {entry.dtype} and must be {dtype}"
    return None


def lora_faults(config: bytes, entries: Mapping[str, Entry], layers: int) -> list[str]:
    """The faults of PEFT's two files.

    Args:
        config: the bytes of `adapter_config.json`.
        entries: the tensors of `adapter_model.safetensors`.
        layers: decoder layers of the base model.
    """
    faults, targets = _lora_config_faults(config)
    if not entries:
        return [*faults, f"{LORA_TENSORS} holds no tensors"]
    pairs = dict[str, dict[str, Entry]]()
    for name, entry in sorted(entries.items()):
        match = LORA_NAME.fullmatch(name)
        if match is None:
            faults.append(
                f"{LORA_TENSORS}: {name[:120]!r} is not a matrix of a LoRA on a linear layer"
            )
            continue
        pairs.setdefault(match[1], {})[match[2]] = entry
        layer = _LAYER.search(f".{match[1]}.")
        if layer and int(layer[1]) >= layers:
            faults.append(
                f"{LORA_TENSORS}: {name[:120]!r} is for layer {layer[1]} and the base model has "
                f"{layers}"
            )
        if entry.dtype not in _FLOATS:
            faults.append(f"{LORA_TENSORS}: {name[:120]!r} must hold finite floats")
    if pairs:
        faults += [
            f"{LORA_CONFIG}: target_modules names {name[:120]!r}, but has no tensor for it"
            for name in _without_tensors(targets, pairs)
        ]
    return faults + [
        fault for module, pair in pairs.items() for fault in _pair_faults(module, pair)
    ]


def _without_tensors(targets: list[str], modules: Iterable[str]) -> list[str]:
    """The targets that are the end of no module's path."""
    lengths = {length for name in targets if (length := name.count(".") + 1) <= _LONGEST_TARGET}
    split = [module.split(".") for module in modules]
    ends = {".".join(parts[-length:]) for length in lengths for parts in split}
    return [name for name in targets if name.count(".") < _LONGEST_TARGET and name not in ends]


def module_faults(
    entries: Mapping[str, Entry], modules: Mapping[str, tuple[int, int]]
) -> list[str]:
    """Why a sound LoRA does not fit a base model.

    Args:
        entries: the tensors of `adapter_model.safetensors`.
        modules: (inputs, outputs) of the base model's linear modules, by path. Experts are left to
            the engine, since transformers may hold them as one module.
    """
    faults = []
    unknown = set()
    for name, entry in sorted(entries.items()):
        match = LORA_NAME.fullmatch(name)
        if match is None or ".experts." in match[1]:
            continue
        module = match[1]
        half = match[2]
        if module not in modules:
            unknown.add(module)
            continue
        side = 1 if half == "A" else 0
        width = modules[module][0 if half == "A" else 1]
        if len(entry.shape) == 2 and entry.shape[side] != width:
            faults.append(
                f"{LORA_TENSORS}: lora_{half} of {module[:120]!r} has shape {entry.shape}, and "
                f"the module of the base model has {width} "
                f"{'inputs' if half == 'A' else 'outputs'}"
            )
    return [*unknown_modules(unknown), *faults]


def unknown_modules(names: Iterable[str]) -> Iterator[str]:
    """A LoRA's modules that a model does not have, as faults of a few hundred characters each. Very
    many are named by layer: `model.layers.[0-31].mlp.up_proj`.
    """
    shown = sorted(name[:200] for name in names)
    if sum(map(len, shown)) > _NAMED_CHARACTERS:
        shown = _by_layer(shown)
    part: list[str] = []
    for name in [*shown, ""]:
        if part and (not name or sum(map(len, part)) + len(name) > _FAULT_CHARACTERS):
            what = "is not a module" if len(part) == 1 else "are not modules"
            yield f"its LoRA is for {', '.join(part)}, which {what} of the base model"
            part = []
        part.append(name)


def _by_layer(names: list[str]) -> list[str]:
    """The names with their layers in brackets, such as [0-3,7]."""
    layers: dict[str, set[int]] = {}
    for name in names:
        match = _LAYER.search(f".{name}.")
        pattern = (
            name
            if match is None
            else f".{name}.".replace(match[0], match[0].replace(match[1], "[]"), 1)[1:-1]
        )
        layers.setdefault(pattern, set()).update([] if match is None else [int(match[1])])
    return [
        pattern.replace("[]", f"[{_ranges(held)}]", 1) for pattern, held in sorted(layers.items())
    ]


def _ranges(numbers: set[int]) -> str:
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _pair_faults(module: str, pair: Mapping[str, Entry]) -> Iterator[str]:
    if len(pair) < 2:
        yield f"{LORA_TENSORS}: {module[:120]!r} has lora_{next(iter(pair))} alone"
        return
    a = pair["A"].shape
    b = pair["B"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        yield (
            f"{LORA_TENSORS}: A and B of {module[:120]!r} have the shapes {a} and {b}, which do "
            "not meet"
        )


def _lora_config_faults(content: bytes) -> tuple[list[str], list[str]]:
    """The faults of `adapter_config.json`, and the modules that it names one by one."""
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as exc:
        return [f"{LORA_CONFIG} is not JSON: {str(exc)[:200]}"], []
    if not isinstance(config, dict):
        return [f"{LORA_CONFIG} is not a JSON object"], []
    faults = []
    if config.get("peft_type") != "LORA":
        peft_type = str(config.get("peft_type"))[:40]
        faults.append(
            f"{LORA_CONFIG}: peft_type is {peft_type!r}; only LORA is supported together with ReFT"
        )
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= _MOST_RANK:
        faults.append(f"{LORA_CONFIG}: r must be a whole number from 1, and it is {str(rank)[:40]}")
    if (
        isinstance(alpha, bool)
        or not isinstance(alpha, int | float)
        or not -math.inf < alpha < math.inf
    ):
        faults.append(f"{LORA_CONFIG}: lora_alpha must be a number, and it is {str(alpha)[:40]}")
    for name, what in _UNSERVED.items():
        if config.get(name) not in (None, False, "none", [], {}):
            faults.append(
                f"{LORA_CONFIG}: {name} is {json.dumps(config[name])[:80]}, and {what} not served"
            )
    targets = config.get("target_modules")
    # A text is a regular expression, or "all-linear": the tensors say what it came to.
    named = targets if isinstance(targets, list) else []
    return faults, [name for name in named[:MAX_TARGETS] if isinstance(name, str)]
