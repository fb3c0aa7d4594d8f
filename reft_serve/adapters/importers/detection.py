"""Detection of a directory's format, and import from any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from reft_serve.adapters.directory import Adapter, is_adapter, publish, read_adapter
from reft_serve.adapters.importers.adapterhub import is_adapterhub, read_adapterhub
from reft_serve.adapters.importers.common import Imported, ImportFlags
from reft_serve.adapters.importers.pyreft import is_pyreft, read_pyreft
from reft_serve.adapters.manifest import BaseFacts, EngineLimits
from reft_serve.errors import AdapterInvalid, AdapterNotFound, AdapterUnsupported, ClientError

__all__ = ["import_adapter", "read_any"]


def import_adapter(
    source: Path,
    base: BaseFacts,
    out: Path,
    flags: ImportFlags,
    max_bytes: int = 1 << 30,
    modules: Callable[[], Mapping[str, tuple[int, int]]] | None = None,
) -> Adapter:
    """Read `source`, regardless of its format, and publish it at `out`. The adapter's `warnings`
    are for its owner.

    Args:
        source, base, flags, max_bytes: as for `read_any`.
        out: a path at which nothing exists yet.
        modules: gives the base's linear modules, for a save that holds a LoRA too; without it the
            LoRA is not compared.

    Raises:
        ClientError: as `read_any` and `publish` do; a LoRA does not fit the base.
    """
    imported = read_any(source, base, flags, max_bytes)
    if imported.lora is not None and modules is not None:
        faults = imported.lora.misfits(modules())
        if faults:
            raise AdapterInvalid(str(source), faults)
    adapter = publish(out, imported.manifest, imported.weights, imported.lora, imported.head)
    return replace(adapter, warnings=imported.warnings)


def read_any(
    source: Path, base: BaseFacts, flags: ImportFlags, max_bytes: int = 1 << 30
) -> Imported:
    """Read a reft-serve adapter, a save or a checkpoint of pyreft, or a save of AdapterHub.

    Args:
        source: the directory.
        base: the base model that it belongs to.
        flags: what the save does not record.
        max_bytes: largest file to take into memory.

    Raises:
        AdapterNotFound: there is no such directory.
        AdapterUnsupported: it is in no format that is known.
        ClientError: what the format's own reader raises.
    """
    if not source.is_dir():
        raise AdapterNotFound(f"there is no directory at {source}")
    if is_adapter(source):
        return _read_ours(source, base, flags, max_bytes)
    if is_pyreft(source):
        return read_pyreft(source, base, flags, max_bytes)
    if is_adapterhub(source):
        return read_adapterhub(source, base, flags, max_bytes)
    raise AdapterUnsupported(
        str(source),
        [
            "unknown format: looked for reft_config.json (ours), intkey_*.bin or "
            "intervenable_model/ (pyreft), and adapter_config.json (AdapterHub)"
        ],
    )


def _read_ours(source: Path, base: BaseFacts, flags: ImportFlags, max_bytes: int) -> Imported:
    if flags != ImportFlags():
        raise ClientError(
            f"{source} is a reft-serve adapter, which records everything: use only --base and --out"
        )
    adapter = read_adapter(source, max_bytes)
    faults = EngineLimits().faults(adapter.manifest, base)
    if faults:
        raise AdapterInvalid(str(source), faults)
    return Imported(adapter.manifest, adapter.weights, adapter.warnings, adapter.lora, adapter.head)
