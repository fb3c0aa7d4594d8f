"""`reft-serve serve`: check the adapters, choose vLLM's flags for them and for this machine, become
vLLM's server.

Every fault of an adapter is reported before vLLM starts. Nothing here imports vllm.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch

from reft_serve import __version__
from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.directory import Adapter, is_adapter, read_adapter
from reft_serve.adapters.importers.common import ImportFlags
from reft_serve.adapters.importers.detection import import_adapter
from reft_serve.adapters.importers.pyreft import is_pyreft
from reft_serve.adapters.lora import holds_lora
from reft_serve.adapters.manifest import BaseFacts, EngineLimits
from reft_serve.config import EngineSettings, ServeSettings, child_environment, read_settings
from reft_serve.engine.launch.flags import check_no_secret, flag_values
from reft_serve.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterUnsupported,
    BaseModelInvalid,
    ClientError,
    EngineUnsupported,
    ImportFlagMissing,
    PositionsInvalid,
)
from reft_serve.storage.files import read_regular_file

__all__ = ["LaunchPlan", "ServeRequest", "become", "plan"]

_PLUGIN = "reft_serve"
_SERVER = "vllm.entrypoints.openai.api_server"
_HEADLESS = "reft_serve.engine.launch.headless"
_KEYED_SERVER = "reft_serve.engine.launch.server"
# vLLM's own defaults, which it applies after us.
_DEFAULT_RANK = 16
_FEWEST_SLOTS = 8
_LORA_RANKS = (32, 64, 128, 256, 320, 512)
_CPU_CACHE_GIB = "1"
# oneDNN's own 1,024 grow by some 300 MB over days of traffic; fewer are no slower, since each layer
# keeps its last 32.
_CPU_KERNELS = "128"
_SAVED = ("*.json", "*.bin", "*.safetensors")


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """The command line. `adapters` are NAME=DIR; `positions` are SPEC or NAME=SPEC; `passed` is for
    vLLM.
    """

    model: str
    adapters: Sequence[str] = ()
    positions: Sequence[str] = ()
    flags: ImportFlags = field(default_factory=ImportFlags)
    passed: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """The planned process: command, additional environment, and the reasons in sentences."""

    command: tuple[str, ...]
    environment: dict[str, str]
    reasons: tuple[str, ...]

    def shell(self) -> str:
        """The same as one line for a shell."""
        changes = (f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        return " ".join([*changes, shlex.join(self.command)])


@dataclass(frozen=True, slots=True, eq=False)
class _Served:
    name: str
    path: Path
    adapter: Adapter
    warnings: tuple[str, ...]


def plan(request: ServeRequest) -> LaunchPlan:
    """Decide what to run. Writes nothing but converted adapters, under `REFT_HOME`.

    Raises:
        ClientError: an adapter, or how it was named, is at fault; the message says what and where.
        ServiceError: vLLM is not installed, its plugins are restricted to others, or a setting
            cannot be read.
    """
    settings = read_settings(EngineSettings)
    ours = read_settings(ServeSettings)
    if request.model.startswith("-"):
        raise ClientError(f"the model comes first: reft-serve serve MODEL {request.model} ...")
    check_no_secret(request.passed)
    _check_engine(ours)
    passed, lora_modules = _split_modules(request.passed)
    flags = flag_values(passed)
    base = _base_facts(request.model)
    taken = {request.model, flags.get("--served-model-name")}
    served = _served(request, taken, base, settings)
    environment, reasons = _limits(served, base, settings, flags)
    command = [sys.executable, "-m", _module_of(flags, ours), "--model", request.model]
    if served or lora_modules:
        added, why = _lora_flags(len(served) + len(lora_modules), flags)
        modules = [_module(adapter) for adapter in served] + lora_modules
        command += [*added, "--lora-modules", *modules]
        reasons += why
    loras = [s.adapter.lora.rank for s in served if s.adapter.lora is not None]
    if max(loras, default=0) > _DEFAULT_RANK and "--max-lora-rank" not in flags:
        rank = next((rank for rank in _LORA_RANKS if rank >= max(loras)), max(loras))
        command += ["--max-lora-rank", str(rank)]
        reasons.append(
            f"--max-lora-rank {rank}: the largest LoRA among the adapters has rank {max(loras)}"
        )
    if served and "lora" not in settings.model_fields_set:
        asks = "adapters that hold a LoRA too" if loras else _asks_for_lora(lora_modules, ours)
        if asks:
            reasons.append(f"the engine decides about LoRA support, because of {asks}")
        else:
            environment["REFT_LORA"] = "off"
            reasons.append(
                "REFT_LORA=off: every adapter is a ReFT adapter, so no LoRA buffer or kernel is "
                "needed"
            )
    if not torch.cuda.is_available() and ours.vllm_cpu_kvcache_space is None:
        environment["VLLM_CPU_KVCACHE_SPACE"] = _CPU_CACHE_GIB
        reasons.append(
            f"VLLM_CPU_KVCACHE_SPACE={_CPU_CACHE_GIB} (GiB of cache): this machine has no GPU"
        )
    if not torch.cuda.is_available() and ours.onednn_primitive_cache_capacity is None:
        environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = _CPU_KERNELS
        reasons.append(
            f"ONEDNN_PRIMITIVE_CACHE_CAPACITY={_CPU_KERNELS}: keeps memory constant on a CPU"
        )
    return LaunchPlan((*command, *passed), environment, (*_adapter_reasons(served), *reasons))


def become(plan: LaunchPlan) -> NoReturn:
    """Replace this process by the server."""
    environment = child_environment(plan.environment)
    os.execve(plan.command[0], plan.command, environment)  # noqa: S606 - no shell is wanted


def _module_of(flags: dict[str, str], settings: ServeSettings) -> str:
    if "--headless" in flags:
        return _HEADLESS
    return _KEYED_SERVER if settings.engine_keys else _SERVER


def _check_engine(settings: ServeSettings) -> None:
    if find_spec("vllm") is None:
        raise EngineUnsupported(
            "vLLM is not installed: install reft-serve[cpu] or reft-serve[cuda]"
        )
    plugins = settings.vllm_plugins
    if plugins is not None and _PLUGIN not in plugins.split(","):
        raise EngineUnsupported(
            f"VLLM_PLUGINS={plugins} leaves ReFT out: add {_PLUGIN} to it, or unset it to have "
            "every plugin"
        )


def _base_facts(model: str) -> BaseFacts | None:
    """The facts of a local model; None for a name of the Hub, which vLLM itself will fetch and
    check against.
    """
    return read_base_model(Path(model)) if Path(model).is_dir() else None


def _served(
    request: ServeRequest, taken: set[str | None], base: BaseFacts | None, settings: EngineSettings
) -> list[_Served]:
    named: dict[str, Path] = {}
    for argument in request.adapters:
        name, equals, where = argument.partition("=")
        if not (name and equals and where):
            raise ClientError(f"--adapter {argument[:200]!r} is not NAME=DIR")
        if name in named or name in taken:
            raise ClientError(
                f"--adapter {name}: the name is already in use; every adapter needs a unique name"
            )
        named[name] = Path(where).expanduser()
    flags = _import_flags(request, named)
    return [_one(name, path, base, flags[name], settings) for name, path in named.items()]


def _import_flags(request: ServeRequest, named: dict[str, Path]) -> dict[str, ImportFlags]:
    """The import flags of each adapter; none for reft-serve adapters, which need none."""
    foreign = {name for name, path in named.items() if not is_adapter(path)}
    flags = {name: request.flags if name in foreign else ImportFlags() for name in named}
    if (request.positions or request.flags != ImportFlags()) and not foreign:
        raise ClientError(
            "--positions, --untied, --last-offset, --activation, --no-bias, --phase, --kind and "
            "--lora-alpha apply to pyreft saves, and there is none: a reft-serve adapter records "
            "these values itself"
        )
    # A SPEC for all first, so that NAME=SPEC stands out from it whatever the order.
    for argument in sorted(request.positions, key=lambda argument: "=" in argument):
        name, equals, spec = argument.rpartition("=")
        if equals and name not in foreign:
            known = "records its positions itself" if name in named else "is not among the adapters"
            raise ClientError(f"--positions {argument[:200]!r}: {name[:100]!r} {known}")
        for target in [name] if equals else foreign:
            flags[target] = replace(flags[target], positions=spec)
    return flags


def _one(
    name: str, path: Path, base: BaseFacts | None, flags: ImportFlags, settings: EngineSettings
) -> _Served:
    if is_adapter(path):
        adapter = read_adapter(path, settings.max_adapter_bytes)
        return _Served(name, path.resolve(), adapter, adapter.warnings)
    if not path.is_dir():
        raise ClientError(f"--adapter {name}: there is no directory at {path}")
    if holds_lora(path) and not is_pyreft(path):
        raise AdapterUnsupported(
            str(path), [f"it is a LoRA: pass it as --lora-modules {name}={path}"]
        )
    if base is None:
        raise BaseModelInvalid(
            f"--adapter {name} must be converted for its base model, so MODEL must be a local "
            f"directory, or convert it first: reft-serve adapter import {path} --base MODEL_DIR "
            "--out DIR"
        )
    try:
        return _converted(name, path, base, flags, settings)
    except (ImportFlagMissing, PositionsInvalid) as exc:
        raise type(exc)(f"--adapter {name} ({path}): {exc}") from exc


def _converted(
    name: str, source: Path, base: BaseFacts, flags: ImportFlags, settings: EngineSettings
) -> _Served:
    """The save, imported: once for the same files, flags and base, and cached after that."""
    if flags.positions is not None:
        flags.rule()
    key = hashlib.sha256(repr((__version__, base, flags)).encode())
    for file in _saved_files(source):
        content = read_regular_file(file, settings.max_adapter_bytes, str(source))
        key.update(f"{file.relative_to(source)}\0{len(content)}\0".encode())
        key.update(content)
    out = settings.home.expanduser().resolve() / "adapters" / key.hexdigest()
    warnings: tuple[str, ...] = ()
    if not out.exists():
        with suppress(AdapterExists):  # another server may be converting the same save
            warnings = import_adapter(source, base, out, flags, settings.max_adapter_bytes).warnings
    return _Served(name, out, read_adapter(out, settings.max_adapter_bytes), warnings)


def _saved_files(source: Path) -> list[Path]:
    places = (source, source / "intervenable_model")
    return sorted(file for place in places for pattern in _SAVED for file in place.glob(pattern))


def _limits(
    served: Iterable[_Served],
    base: BaseFacts | None,
    settings: EngineSettings,
    flags: dict[str, str],
) -> tuple[dict[str, str], list[str]]:
    """Check every adapter against the base and the engine's limits, raising limits that are not
    set.
    """
    served = list(served)
    ranks = [spec.unit_rank for s in served for spec in s.adapter.manifest.interventions]
    counts = [len(s.adapter.manifest.interventions) for s in served]
    layers = max((s.adapter.manifest.base_model.num_hidden_layers for s in served), default=1)
    environment = {}
    reasons = []
    rank = settings.max_rank or int(flags.get("--max-lora-rank") or _DEFAULT_RANK)
    if settings.max_rank is None and max(ranks, default=0) > rank:
        rank = max(ranks)
        environment["REFT_MAX_RANK"] = str(rank)
        reasons.append(f"REFT_MAX_RANK={rank}: the largest rank among the adapters")
    count = settings.max_interventions or 2 * layers
    if settings.max_interventions is None and max(counts, default=0) > count:
        count = max(counts)
        environment["REFT_MAX_INTERVENTIONS"] = str(count)
        reasons.append(f"REFT_MAX_INTERVENTIONS={count}: the largest number in one of the adapters")
    limits = EngineLimits(max_rank=rank, max_interventions=count)
    for s in served:
        faults = limits.faults(s.adapter.manifest, base or s.adapter.manifest.base_model)
        if faults:
            raise AdapterInvalid(f"{s.name} ({s.path})", faults)
    return environment, reasons


def _split_modules(passed: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without `--lora-modules`, and the modules: vLLM would take only the last such
    list.
    """
    kept: list[str] = []
    modules: list[str] = []
    inside = False
    for argument in passed:
        if argument.startswith("-"):
            flag, equals, value = argument.partition("=")
            inside = flag.replace("_", "-") == "--lora-modules"
            if inside:
                modules += [value] if equals else []
                continue
        (modules if inside else kept).append(argument)
    return kept, modules


def _lora_flags(count: int, flags: dict[str, str]) -> tuple[list[str], list[str]]:
    added = []
    reasons = ["--enable-lora: vLLM loads ReFT adapters through its LoRA interface"]
    if "--enable-lora" not in flags:
        added.append("--enable-lora")
    if "--max-loras" not in flags:
        slots = max(_FEWEST_SLOTS, count)
        added += ["--max-loras", str(slots)]
        reasons.append(f"--max-loras {slots}: adapters that fit in one batch")
    return added, reasons


def _asks_for_lora(modules: Sequence[str], settings: ServeSettings) -> str | None:
    if modules:
        return "--lora-modules"
    runtime = (settings.vllm_allow_runtime_lora_updating or "").strip().lower()
    return "VLLM_ALLOW_RUNTIME_LORA_UPDATING" if runtime in ("1", "true") else None


def _module(served: _Served) -> str:
    name = served.name
    path = str(served.path)
    # vLLM splits NAME=PATH at its first "=", and reads whatever holds a comma as JSON.
    return json.dumps({"name": name, "path": path}) if "," in name + path else f"{name}={path}"


def _adapter_reasons(served: Iterable[_Served]) -> list[str]:
    lines = []
    for s in served:
        rule = s.adapter.manifest.positions
        specs = s.adapter.manifest.interventions
        kinds = ", ".join(sorted({spec.kind for spec in specs}))
        lora = "" if s.adapter.lora is None else f" and a LoRA of rank {s.adapter.lora.rank}"
        if (head := s.adapter.manifest.head) is not None:
            lora += f" and a head for {head.task} with {len(head.labels)} outputs"
        lines.append(
            f"{s.name}: {kinds} at {len(specs)} places{lora}, positions {rule.spec}, from {s.path}"
        )
        lines += [f"{s.name}: warning: {warning}" for warning in s.warnings]
    return lines
