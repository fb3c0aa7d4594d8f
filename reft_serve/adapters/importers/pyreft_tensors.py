"""The tensors of one intervention of a pyreft save, renamed to those of its kind."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from reft_serve.adapters.importers.common import (
    read_torch,
    rotation,
)
from reft_serve.adapters.importers.pyreft_sites import Site
from reft_serve.errors import (
    AdapterInvalid,
)

__all__ = ["read_tensors"]

_VECTOR_NAMES = ("bias", "source_representation")
_NAMES = {
    "weight": "W",
    "bias": "b",
    "learned_source": "b",
    "learned_source.weight": "W",
    "learned_source.bias": "b",
    "proj_layer.weight": "W2",
    "proj_layer.bias": "b2",
}


def read_tensors(source: Path, site: Site, max_bytes: int, where: str) -> dict[str, Tensor]:
    saved = read_torch(source / site.file, max_bytes, where)
    sizes = [saved.pop(size, None) for size in ("embed_dim", "interchange_dim")]
    if (vector := _vector(saved, site)) is not None:
        return _shift(vector, site, sizes[1], where)
    R = rotation(saved, "rotate_layer.", False, site.file, where)
    if R is None and "rotate_layer" in saved:
        # LoReFT saves the final weight, (hidden, rank).
        R = saved.pop("rotate_layer")
        R = R.mT if R.ndim == 2 else R
    unknown = sorted(saved.keys() - _NAMES.keys())
    if unknown:
        raise AdapterInvalid(
            where, [f"{site.file} holds {unknown[0][:80]!r}, which no intervention of pyreft has"]
        )
    tensors = {_NAMES[name]: tensor for name, tensor in saved.items()}
    if len(tensors) < len(saved):
        raise AdapterInvalid(
            where, [f"{site.file} holds tensors of two layouts ({', '.join(sorted(saved))})"]
        )
    return tensors if R is None else {"R": R, **tensors}


def _vector(saved: dict[str, Tensor], site: Site) -> Tensor | None:
    """The vector of an intervention that only adds it; None for a lobireft of pyreft's own."""
    if site.kind != "lobireft" or len(saved) != 1:
        return None
    name, tensor = next(iter(saved.items()))
    vector = tensor.flatten() if tensor.ndim and tensor.numel() == tensor.shape[-1] else tensor
    alone = name in _VECTOR_NAMES or (site.sign is not None and vector.ndim == 1)
    return vector if alone else None


def _shift(vector: Tensor, site: Site, changed: Tensor | None, where: str) -> dict[str, Tensor]:
    """R and b of a lobireft of rank 1 that adds the vector: its direction, and its length with its
    sign.
    """
    fault = None
    if vector.ndim != 1 or not vector.is_floating_point() or not vector.isfinite().all():
        fault = (
            f"must hold one vector of finite floats, and holds {tuple(vector.shape)} of "
            f"{str(vector.dtype)[6:]}"
        )
    elif changed is not None and int(changed) != len(vector):
        fault = f"changes {int(changed)} of {len(vector)} dimensions only, which is not supported"
    elif not (length := vector.double().norm()):
        fault = "adds a vector of zeros, which has no effect"
    if fault is not None:
        raise AdapterInvalid(where, [f"{site.file} {fault}"])
    sign = 1.0 if site.sign is None else site.sign
    return {"R": (vector.double() / length)[None].float(), "b": (sign * length)[None].float()}
