"""An adapter's directory: `reft_config.json` and `reft_model.safetensors`, read whole and checked,
published whole.

Tensor k of the file is `interventions.<k>.<name>`, names as in `vocabulary.required_tensors`.
PEFT's two files may lie next to them: then the adapter is both, ReFT and LoRA. The digest over the
bytes of the files is the version's name: equal digests are equal adapters, wherever they lie.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from reft_serve.adapters.digest import digest_of
from reft_serve.adapters.head import HEAD_PREFIX
from reft_serve.adapters.lora import Lora, holds_lora, lora_of_files
from reft_serve.adapters.manifest import DType, Manifest, manifest_faults, parse_manifest
from reft_serve.adapters.structure import (
    CONFIG,
    LORA_CONFIG,
    LORA_TENSORS,
    MAX_CONFIG_BYTES,
    TENSORS,
    tensor_faults,
)
from reft_serve.adapters.tensors import entries_of, parse_tensors
from reft_serve.errors import AdapterChanged, AdapterInvalid, AdapterNotFound, AdapterUnsupported
from reft_serve.interventions.heads import Head
from reft_serve.interventions.kinds import Weights, fold
from reft_serve.interventions.vocabulary import (
    ACTIVATION_CODES,
    ORTHONORMAL,
    ORTHONORMAL_TOLERANCE,
    optional_tensors,
    required_tensors,
)
from reft_serve.storage.files import read_regular_file, write_directory

__all__ = [
    "CONFIG",
    "DTYPES",
    "TENSORS",
    "Adapter",
    "check_tensors",
    "head_of",
    "is_adapter",
    "publish",
    "read_adapter",
    "read_version",
]

DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One immutable version. `weights[k]` belongs to `manifest.interventions[k]`; `digest` is
    sha256 in hex; `lora` is its other half and `head` its classifier, if it has one.
    """

    manifest: Manifest
    weights: tuple[Weights, ...]
    digest: str
    warnings: tuple[str, ...] = ()
    lora: Lora | None = None
    head: Head | None = None


def is_adapter(path: Path) -> bool:
    """True if the directory claims to be an adapter; its contents are not checked."""
    return os.path.lexists(path / CONFIG)


def read_adapter(
    path: Path,
    max_bytes: int = 1 << 30,
    unsupported: Callable[[Manifest], Sequence[str]] | None = None,
) -> Adapter:
    """Read and check a directory. The result is valid in itself; the base model is not considered.

    Args:
        path: the directory. Its files must be regular files: a link could point anywhere.
        max_bytes: largest tensor file to take into memory.
        unsupported: why an engine cannot serve a manifest; asked before the tensors are computed
            with, whose cost grows with the rank.

    Raises:
        AdapterNotFound: no directory, or no `reft_config.json` in it.
        AdapterUnsupported: what `unsupported` reports.
        AdapterInvalid: every fault found: manifest, missing or unknown tensors, shapes, dtypes, NaN
            or Inf, a truncated or oversized file, links, and adapters without any effect.
    """
    files = _read_files(path, max_bytes)
    manifest = parse_manifest(files[CONFIG], str(path))
    if unsupported is not None and (faults := unsupported(manifest)):
        raise AdapterUnsupported(str(path), faults)
    named = parse_tensors(files[TENSORS], TENSORS, str(path))
    weights, warnings = check_tensors(manifest, named, str(path))
    lora = None
    if LORA_CONFIG in files:
        halves = {name: files[name] for name in (LORA_CONFIG, LORA_TENSORS)}
        lora = lora_of_files(halves, manifest.base_model.num_hidden_layers, str(path))
    return Adapter(manifest, weights, digest_of(files), warnings, lora, head_of(manifest, named))


def read_version(path: Path, digest: str, max_bytes: int = 1 << 30) -> Adapter:
    """Read a version that `read_adapter` has checked before, without checking its tensors again or
    keeping its LoRA.

    Raises:
        AdapterNotFound, AdapterInvalid: the files are gone or cannot be read.
        AdapterChanged: they are another version.
    """
    files = _read_files(path, max_bytes)
    actual = digest_of(files)
    if actual != digest:
        raise AdapterChanged(
            f"the adapter at {path} is no longer version {digest[:12]} but {actual[:12]}: load it "
            "again"
        )
    manifest = parse_manifest(files[CONFIG], str(path))
    named = parse_tensors(files[TENSORS], TENSORS, str(path))
    own = _by_intervention(manifest, named)
    weights = (
        Weights.of(s.kind, mine, s.activation)
        for s, mine in zip(manifest.interventions, own, strict=True)
    )
    return Adapter(manifest, tuple(weights), digest, head=head_of(manifest, named))


def _read_files(path: Path, max_bytes: int) -> dict[str, bytes]:
    if not path.is_dir():
        raise AdapterNotFound(f"there is no adapter directory at {path}")
    if not is_adapter(path):
        raise AdapterNotFound(f"{path} holds no {CONFIG}, so it is not a ReFT adapter directory")
    where = str(path)
    files = {
        CONFIG: read_regular_file(path / CONFIG, MAX_CONFIG_BYTES, where),
        TENSORS: read_regular_file(path / TENSORS, max_bytes, where),
    }
    if holds_lora(path):
        files[LORA_CONFIG] = read_regular_file(path / LORA_CONFIG, MAX_CONFIG_BYTES, where)
        files[LORA_TENSORS] = read_regular_file(path / LORA_TENSORS, max_bytes, where)
    return files


def _by_intervention(manifest: Manifest, named: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    letters = [
        (*required_tensors(spec.kind), *optional_tensors(spec.kind))
        for spec in manifest.interventions
    ]
    keys = [
        {letter: f"interventions.{k}.{letter}" for letter in own} for k, own in enumerate(letters)
    ]
    return [{letter: named[key] for letter, key in own.items() if key in named} for own in keys]


def head_of(manifest: Manifest, named: Mapping[str, Tensor]) -> Head | None:
    """The head among an adapter's tensors, which `check_tensors` has found sound."""
    if manifest.head is None:
        return None
    own = {
        name.removeprefix(HEAD_PREFIX): tensor
        for name, tensor in named.items()
        if name.startswith(HEAD_PREFIX)
    }
    return Head.of(own, ACTIVATION_CODES[manifest.head.activation or "linear"])


def publish(
    path: Path,
    manifest: Manifest,
    weights: Sequence[Weights],
    lora: Lora | None = None,
    head: Head | None = None,
) -> Adapter:
    """Write an adapter so that it is there whole or not at all, even when the process dies
    half-way.

    Raises:
        AdapterExists: something is at `path` already.
        AdapterInvalid: the adapter fails the checks that reading it would make; nothing was
            written.
    """
    named = {
        f"interventions.{k}.{name}": t.detach().clone(memory_format=torch.contiguous_format)
        for k, w in enumerate(weights)
        for name, t in w.tensors().items()
    }
    if head is not None:
        named |= {
            f"{HEAD_PREFIX}{name}": t.detach().clone(memory_format=torch.contiguous_format)
            for name, t in head.tensors().items()
        }
    faults = manifest_faults(manifest)
    if faults:
        raise AdapterInvalid(str(path), faults)
    kept, warnings = check_tensors(manifest, named, str(path))
    files = {CONFIG: manifest.to_json().encode(), TENSORS: save_safetensors(named)}
    if lora is not None:
        files |= lora.files
    write_directory(path, files.items())
    return Adapter(manifest, kept, digest_of(files), warnings, lora, head_of(manifest, named))


def check_tensors(
    manifest: Manifest, named: Mapping[str, Tensor], where: str
) -> tuple[tuple[Weights, ...], tuple[str, ...]]:
    """Match tensors to the manifest: (weights, warnings).

    Raises:
        AdapterInvalid: every fault found.
    """
    structural = list(tensor_faults(manifest, entries_of(named)))
    damaged = {name for name, _ in structural}
    faults = [fault for _, fault in structural]
    faults += [
        f"{name} holds NaN or Inf"
        for name, tensor in sorted(named.items())
        if name.startswith(HEAD_PREFIX) and name not in damaged and not tensor.isfinite().all()
    ]
    weights: list[Weights] = []
    warnings: list[str] = []
    for k, (spec, own) in enumerate(
        zip(manifest.interventions, _by_intervention(manifest, named), strict=True)
    ):
        whole = {
            name: tensor
            for name, tensor in own.items()
            if f"interventions.{k}.{name}" not in damaged
        }
        value_faults = list(_value_faults(whole))
        faults += [f"intervention {k} ({spec.where}): {fault}" for fault in value_faults]
        if (
            value_faults
            or len(whole) < len(own)
            or not whole.keys() >= set(required_tensors(spec.kind))
        ):
            continue
        weights.append(Weights.of(spec.kind, own, spec.activation))
        if spec.kind in ORTHONORMAL:
            off = _orthonormal_error(weights[-1].projection)
            if off > ORTHONORMAL_TOLERANCE:
                warnings.append(
                    f"intervention {k} ({spec.where}): R is not orthonormal (off by {off:.2g}), "
                    "as after a resumed training in pyreft; it is served unchanged"
                )
    if not faults and all(fold(w, torch.float64).does_nothing for w in weights):
        faults.append("it has no effect: every intervention leaves the hidden states unchanged")
    if faults:
        raise AdapterInvalid(where, faults)
    return tuple(weights), tuple(warnings)


def _value_faults(own: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in sorted(own.items()):
        if not tensor.isfinite().all():
            yield f"{name} holds NaN or Inf"
        elif name in ("R", "W2") and not tensor.any():
            yield (
                f"{name} is all zeros, so the edit has no effect (caused by weight decay on "
                "pyreft's rotation)"
            )


def _orthonormal_error(R: Tensor) -> float:
    eye = torch.eye(len(R), dtype=torch.float64)
    R = R.double()
    return float((R @ R.T - eye).abs().max())
