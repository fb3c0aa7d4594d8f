"""The plugin: checks that the vLLM functions in `seams` are those that the wrappers were written
for, then wraps them.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any

import vllm

from reft_serve.config import default_environment
from reft_serve.engine.seams import ADDITIONS, SEAMS, Addition, Seam, fingerprint
from reft_serve.engine.worker.workarounds import permit_amx
from reft_serve.errors import EngineUnsupported

__all__ = ["KNOWN_VERSIONS", "Target", "apply", "check_version", "register", "resolve", "source_of"]

KNOWN_VERSIONS = ("0.32.0",)

_registered = False
_registering = threading.RLock()


@dataclass(frozen=True, slots=True)
class Target:
    """A seam's function as it is found: the places that hold it, and its raw attribute (a function,
    or a static or class method).
    """

    seam: Seam
    owners: tuple[Any, ...]
    raw: Any


def register() -> None:
    """Make this process's vLLM serve ReFT adapters. vLLM calls it in every process; further calls
    do nothing.

    Everything is checked before anything is wrapped, so a refusal leaves vLLM as it was.

    Raises:
        EngineUnsupported: a vLLM version, or a function of it, that this plugin was not written
            for.
    """
    global _registered
    with _registering:
        if _registered:
            return
        check_version(vllm.__version__)
        # vLLM's tags for tool calls are understood by xgrammar alone, and leave the arguments free;
        # without them a forced call follows the JSON schema of its tool. Parsers read this when
        # they are imported.
        default_environment({"VLLM_ENFORCE_STRICT_TOOL_CALLING": "0"})
        apply(resolve(SEAMS, vllm.__version__), ADDITIONS)
        permit_amx()
        _add_usage_route()
        _add_models()
        _registered = True


def check_version(version: str) -> None:
    """Refuse a vLLM version that this plugin was not tested with."""
    if _public(version) not in KNOWN_VERSIONS:
        raise EngineUnsupported(
            f"reft-serve knows vLLM {', '.join(KNOWN_VERSIONS)} and this is {version}: install a "
            "known version, or start without ReFT by VLLM_PLUGINS=''"
        )


def resolve(seams: Sequence[Seam], version: str) -> list[Target]:
    """Find every seam's function and check that wrapping it reaches all of its callers. Changes
    nothing.

    Raises:
        EngineUnsupported: a function is missing, has another source, is held by a module or
            overridden by a class that the seam does not name; the message names each function.
    """
    targets = []
    faults = []
    for seam in seams:
        try:
            target = _target(seam)
        except (ImportError, AttributeError, KeyError):
            faults.append(f"{seam} does not exist")
            continue
        targets.append(target)
        if fingerprint(_source(target.raw)) != seam.sources.get(_public(version)):
            faults.append(f"{seam} has another source than the one that reft-serve was written for")
        faults += [
            f"{seam} is overridden by {name}"
            for name in _overrides(target)
            if name not in seam.overridden_by
        ]
    faults += [f"{target.seam} is also held by {name}" for target, name in _other_holders(targets)]
    if faults:
        raise EngineUnsupported(
            f"reft-serve does not match the installed vLLM {version}: {'; '.join(faults)}. "
            "Install vLLM from its own wheel and remove plugins that change these functions, or "
            "start without ReFT by VLLM_PLUGINS=''"
        )
    return targets


def apply(targets: Sequence[Target], additions: Sequence[Addition]) -> None:
    """Wrap every function that `resolve` found, and add our methods."""
    wrappers = [_ours(target.seam.wrapper) for target in targets]
    added = [
        (_owner(addition.owner), addition.name, _ours(addition.function)) for addition in additions
    ]
    for target, wrapper in zip(targets, wrappers, strict=True):
        # A function with several rows is wrapped once more by each: the last row's wrapper is
        # called first.
        replacement = _wrapped(vars(target.owners[0])[target.seam.name], wrapper)
        for owner in target.owners:
            setattr(owner, target.seam.name, replacement)
    for owner, name, function in added:
        setattr(owner, name, function)


def _add_usage_route() -> None:
    from vllm.entrypoints.serve.instrumentator import health

    from reft_serve.engine.front_end import usage

    usage.add_route(health.router)


def _add_models() -> None:
    known = vllm.ModelRegistry.models
    for name in ("DistilBertModel", "DistilBertForMaskedLM"):
        if name not in known:  # a plugin may bring its own
            vllm.ModelRegistry.register_model(
                name, "reft_serve.engine.worker.distilbert:DistilBertEmbeddingModel"
            )


def source_of(seam: Seam) -> str:
    """The source text of a seam's function in the installed vLLM."""
    return _source(_target(seam).raw)


def _target(seam: Seam) -> Target:
    owner = _owner(seam.owner)
    raw = vars(owner)[seam.name]
    holders = [sys.modules[name] for name in seam.holders if name in sys.modules]
    missing = [holder.__name__ for holder in holders if vars(holder).get(seam.name) is not raw]
    if missing:
        raise KeyError(missing)
    return Target(seam, (owner, *holders), raw)


def _wrapped(raw: Any, wrapper: Callable[[Any], Any]) -> Any:
    if isinstance(raw, (staticmethod, classmethod)):
        return type(raw)(wraps(raw.__func__)(wrapper(raw.__func__)))
    return wraps(raw)(wrapper(raw))


def _owner(path: str) -> Any:
    module, _, name = path.partition(":")
    owner = import_module(module)
    return getattr(owner, name) if name else owner


def _ours(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _source(raw: Any) -> str:
    try:
        return inspect.getsource(getattr(raw, "__func__", raw))
    except (OSError, TypeError):  # compiled, or made at run time
        return ""


def _overrides(target: Target) -> Iterator[str]:
    waiting = [owner for owner in target.owners if inspect.isclass(owner)]
    while waiting:
        for subclass in waiting.pop().__subclasses__():
            waiting.append(subclass)
            if target.seam.name in vars(subclass):
                yield f"{subclass.__module__}:{subclass.__qualname__}"


def _other_holders(targets: Sequence[Target]) -> Iterator[tuple[Target, str]]:
    """The modules that hold a wrapped function of a module by name and are not named by its
    seam.
    """
    functions = {id(target.raw): target for target in targets if inspect.ismodule(target.owners[0])}
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "").startswith("vllm"):
            continue
        for value in list(vars(module).values()):
            target = functions.get(id(value))
            if target is not None and module not in target.owners:
                yield target, module.__name__


def _public(version: str) -> str:
    return version.partition("+")[0]
