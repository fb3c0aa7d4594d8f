"""The tensors of a safetensors file, in torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from reft_serve.adapters.header import Entry
from reft_serve.errors import AdapterInvalid

__all__ = ["entries_of", "parse_tensors"]


def parse_tensors(content: bytes, name: str, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file called `name`.

    Raises:
        AdapterInvalid: it is damaged, or another kind of file.
    """
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, OverflowError, RuntimeError) as exc:
        short = re.sub(r"\s+", " ", str(exc))[:200]
        raise AdapterInvalid(
            where, [f"{name} is damaged or not a safetensors file ({short})"]
        ) from exc


def entries_of(named: Mapping[str, Tensor]) -> dict[str, Entry]:
    """The tensors as a header would describe them."""
    return {
        name: Entry(str(tensor.dtype)[6:], tuple(tensor.shape)) for name, tensor in named.items()
    }
