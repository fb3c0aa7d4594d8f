"""The front end's side: from a LoRA request as users write it to a checked one that carries its
identity.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from vllm.config import VllmConfig
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from reft_serve.adapters.directory import CONFIG, is_adapter, read_adapter
from reft_serve.adapters.head import HeadSpec
from reft_serve.adapters.manifest import Manifest
from reft_serve.engine.adapter_ref import (
    AdapterRef,
    adapter_ref,
    bound_request,
)
from reft_serve.engine.front_end import classifying
from reft_serve.engine.front_end.request_fields import (
    at_strength,
    end_prompt,
    prompt_tokens_of,
    strength_of,
)
from reft_serve.engine.front_end.server_answers import faults_of
from reft_serve.engine.vllm_config import (
    base_facts,
    limits_of,
    rank_faults,
    settings_of,
)
from reft_serve.errors import AdapterUnsupported

__all__ = ["Binder", "binder_of"]


@dataclass(frozen=True, slots=True)
class _Bound:
    """What an id is bound to, with the name and path that it was given for."""

    name: str
    path: str
    request: LoRARequest
    head: HeadSpec | None = None


class Binder:
    """Binds requests to adapter versions; one per front-end engine object.

    A directory is read once per (name, id, path): like vLLM's own adapters, a name keeps its
    version until it is loaded again (`load_inplace`) or removed.
    """

    def __init__(self, config: VllmConfig) -> None:
        self._config = config
        self._bound: dict[int, _Bound] = {}  # by the front end's id

    def bind(self, request: LoRARequest | None) -> LoRARequest | None:
        """The request that the engine gets: LoRA and base requests as they are, ReFT ones with
        their identity.

        Raises:
            AdapterInvalid, AdapterUnsupported: the directory cannot be served; every fault is
                named.
            LoRAAdapterNotFoundError: there is none (vLLM's own error, which its server answers with
                404).
        """
        if request is None or self._config.lora_config is None:
            return request
        bound = self._bound.get(request.lora_int_id)
        if (
            bound is None
            or request.load_inplace
            or (bound.name, bound.path) != (request.lora_name, request.lora_path)
        ):
            bound = self._read(request)
            self._bound[request.lora_int_id] = bound
            if adapter_ref(bound.request) is not None:
                # It is loaded again now. vLLM keeps the request object, and would ask for it with
                # every use of the name.
                request.load_inplace = False
        return bound.request

    def check(self, path: str) -> None:
        """Raise what `bind` would raise for an adapter at this path."""
        self._read(LoRARequest("check", 1, path))

    def forget(self, lora_int_id: int) -> int:
        """Forget what an id was bound to and return the id that the engine knows it by."""
        engine_id = self.engine_id(lora_int_id)
        self._bound.pop(lora_int_id, None)
        return engine_id

    def head_of(self, lora_int_id: int, digest: str) -> HeadSpec | None:
        """The classifier head of a version; None if the id is no longer bound to that version."""
        bound = self._bound.get(lora_int_id)
        identity = None if bound is None else adapter_ref(bound.request)
        same = bound is not None and identity is not None and identity.digest == digest
        return bound.head if bound is not None and same else None

    def engine_id(self, lora_int_id: int) -> int:
        """The id that the engine knows an id of the front end by."""
        bound = self._bound.get(lora_int_id)
        return lora_int_id if bound is None else bound.request.lora_int_id

    def front_end_ids(self, engine_ids: Iterable[int]) -> set[int]:
        """The front end's ids of adapters that the engine lists."""
        bound_now = self._bound.copy()  # threads bind meanwhile
        engine_id_of = {number: bound.request.lora_int_id for number, bound in bound_now.items()}
        listed = set(engine_ids)  # a list, where it came over a socket
        ours = {number for number, engine_id in engine_id_of.items() if engine_id in listed}
        return ours | (listed - set(engine_id_of.values()))

    def _read(self, request: LoRARequest) -> _Bound:
        name, location = request.lora_name, request.lora_path
        path = Path(get_adapter_absolute_path(location))
        if not is_adapter(path):
            return _Bound(name, location, self._as_lora(request, path))
        adapter = read_adapter(path, settings_of(self._config).max_adapter_bytes, self._faults)
        faults = self._lora_faults(path) if adapter.lora is not None else []
        if faults:
            raise AdapterUnsupported(str(path), faults)
        head = adapter.manifest.head
        identity = AdapterRef(
            adapter.digest,
            adapter.manifest.positions,
            adapter.lora is not None,
            head=head is not None,
        )
        return _Bound(name, location, bound_request(request, str(path), identity), head)

    def _faults(self, manifest: Manifest) -> list[str]:
        """Why this engine cannot serve the interventions."""
        faults = limits_of(self._config).faults(manifest, base_facts(self._config))
        faults += classifying.head_engine_faults(manifest.head, self._config)
        return faults + rank_faults(self._config, manifest.interventions)

    def _lora_faults(self, path: Path) -> list[str]:
        """Why this engine cannot serve the LoRA of a directory that holds both, as far as its
        config shows.
        """
        if settings_of(self._config).lora == "off":
            return [
                "it also holds a LoRA, and this engine serves ReFT only: set REFT_LORA=on to "
                "serve both"
            ]
        try:
            helper = PEFTHelper.from_local_dir(str(path), self._config.model_config.max_model_len)
            helper.validate_legal(self._config.lora_config)
        except (ValueError, TypeError) as exc:
            return [f"its LoRA: {exc}"]
        return []

    def _as_lora(self, request: LoRARequest, path: Path) -> LoRARequest:
        if any(path.glob("intkey_*.bin")) or any(path.glob("intervenable_model/intkey_*.bin")):
            raise AdapterUnsupported(
                str(path),
                [
                    "it is a pyreft save; convert it first: reft-serve adapter import DIR --base "
                    "MODEL --positions ..."
                ],
            )
        if not path.is_dir():
            raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
        if settings_of(self._config).lora == "off":
            raise AdapterUnsupported(
                str(path),
                [
                    f"it holds no {CONFIG}, and this engine serves ReFT only: set REFT_LORA=on to "
                    "serve LoRA too"
                ],
            )
        return request


_binders: WeakKeyDictionary[Any, Binder] = WeakKeyDictionary()  # by input processor


def binder_of(engine: Any) -> Binder:
    """The binder of a front-end engine object; the input processor and its engine share one."""
    processor = getattr(engine, "input_processor", engine)
    binder = _binders.get(processor)
    if binder is None:
        # threads may come here at once
        binder = _binders.setdefault(processor, Binder(processor.vllm_config))
    return binder


def wrap_process_inputs(original: Any) -> Callable[..., Any]:
    """Around `InputProcessor.process_inputs`: the request continues with its adapter's identity."""
    signature = inspect.signature(original)

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        params = call.arguments["params"]
        bound = binder_of(self).bind(call.arguments.get("lora_request"))
        call.arguments["lora_request"] = at_strength(bound, strength_of(params))
        prompt_tokens = prompt_tokens_of(params, call.arguments["request_id"])
        classifying.choose_head(adapter_ref(bound), params, self.vllm_config)
        request = original(*call.args, **call.kwargs)
        if prompt_tokens is not None:
            end_prompt(request, prompt_tokens)
        return request

    return process_inputs


def wrap_add_lora(original: Any) -> Callable[..., Any]:
    """Around `add_lora` of `LLMEngine` and of `AsyncLLM`, whose event loop must not wait for a
    disk.
    """

    async def add_from_thread(self: Any, request: LoRARequest) -> Any:
        with faults_of(request.lora_path):
            bound = await asyncio.to_thread(binder_of(self).bind, request)
            if adapter_ref(bound) is not None:
                await self.engine_core.call_utility_async("reft_read_ahead", bound)
            return await original(self, bound)

    def add(self: Any, request: LoRARequest) -> Any:
        with faults_of(request.lora_path):
            return original(self, binder_of(self).bind(request))

    return add_from_thread if inspect.iscoroutinefunction(original) else add


def wrap_remove_lora(original: Any) -> Callable[..., Any]:
    """Around `remove_lora`: by the engine's id."""
    return lambda self, lora_id: original(self, binder_of(self).forget(lora_id))


def wrap_pin_lora(original: Any) -> Callable[..., Any]:
    """Around `pin_lora`: by the engine's id."""
    return lambda self, lora_id: original(self, binder_of(self).engine_id(lora_id))


def wrap_list_loras(original: Any) -> Callable[..., Any]:
    """Around `list_loras`: in the front end's ids."""

    async def listed(answer: Awaitable[set[int]], binder: Binder) -> set[int]:
        return binder.front_end_ids(await answer)

    def list_ids(self: Any) -> Any:
        answer = original(self)
        return (
            listed(answer, binder_of(self))
            if inspect.isawaitable(answer)
            else binder_of(self).front_end_ids(answer)
        )

    return list_ids
