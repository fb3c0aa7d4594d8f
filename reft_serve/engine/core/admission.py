"""A request enters the scheduler only once every worker holds its adapter, and they hold it until
it is finished.

A failure in the middle of a step would end the engine for everyone; here it ends one request.
Whether files vanish or change afterwards do not matter. Files are read and folded off the core's
loop, so that a load holds up the steps of others only while its units are copied.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.v1.request import Request

from reft_serve.adapters.engine_fault import EngineFault
from reft_serve.engine.adapter_ref import IDS, AdapterRef, adapter_ref, with_engine_id
from reft_serve.engine.vllm_config import base_facts, limits_of, settings_of
from reft_serve.engine.worker.registry import Folded, read_folded
from reft_serve.errors import ReftError, ServiceError

__all__ = [
    "Admission",
    "admission_of",
    "read_ahead",
    "wrap_add_lora",
    "wrap_add_request",
    "wrap_free_request",
    "wrap_pin_lora",
    "wrap_preprocess_add_request",
    "wrap_remove_lora",
]

logger = logging.getLogger("vllm.reft_serve")


class Admission:
    """The versions that the workers of one engine hold.

    Its methods run on the core's loop, except `read_ahead`.

    Args:
        executor: vLLM's executor, asked to hold versions with unfinished requests and, from time to
            time, to release them.
        config: what adapters are read for. As many versions without requests stay held as vLLM's
            --max-cpu-loras says, least recently used first out.
    """

    def __init__(self, executor: Any, config: VllmConfig) -> None:
        assert config.lora_config is not None
        self._executor = executor
        self._most_idle = config.lora_config.max_cpu_loras
        self._base = base_facts(config)
        self._limits = limits_of(config)
        self._max_bytes = settings_of(config).max_adapter_bytes
        self._unfinished: Counter[str] = Counter()
        # The ids that front ends know them by.
        self._idle: OrderedDict[str, int] = OrderedDict()
        self._pinned: set[int] = set()
        self._held: set[str] = set()
        self._ahead: dict[str, Folded] = {}
        # By identity: two strengths, or two prompt ends, of one version are two adapters to a
        # batch.
        self._requests: Counter[AdapterRef] = Counter()
        self._ids: dict[AdapterRef, int] = {}

    def read_ahead(self, request: LoRARequest | None) -> None:
        """Read the adapter of a request that is about to be admitted or loaded. Called off the
        loop, by any thread.

        Raises:
            AdapterNotFound, AdapterInvalid, AdapterChanged, AdapterUnsupported: as
                `registry.read_folded` does.
        """
        identity = adapter_ref(request)
        # In this order: what is taken from `_ahead` has come to `_held` before.
        if (
            request is None
            or identity is None
            or identity.digest in self._ahead
            or identity.digest in self._held
        ):
            return
        folded = read_folded(identity, request.lora_path, self._base, self._limits, self._max_bytes)
        self._ahead[identity.digest] = folded
        if identity.digest in self._held:
            self._ahead.pop(identity.digest, None)

    def admit(self, request: Request) -> None:
        """Have the workers hold the request's adapter, and give the request an id that no other
        identity has.

        Raises:
            ReftError: what a worker met; the request must not be scheduled then.
        """
        identity = adapter_ref(request.lora_request)
        if identity is None:
            return
        self._hold(request.lora_request, identity)
        self._idle.pop(identity.digest, None)
        self._unfinished[identity.digest] += 1
        self._requests[identity] += 1
        if identity not in self._ids:
            self._ids[identity] = self._free_id(identity)
        request.lora_request = with_engine_id(request.lora_request, self._ids[identity])

    def finished(self, request: Request) -> None:
        """Note that a request which was admitted is over, however it ended."""
        identity = adapter_ref(request.lora_request)
        if identity is None:
            return
        self._requests[identity] -= 1
        if self._requests[identity] <= 0:
            del self._requests[identity], self._ids[identity]
        self._unfinished[identity.digest] -= 1
        if self._unfinished[identity.digest] <= 0:
            del self._unfinished[identity.digest]
            self._idle[identity.digest] = identity.engine_id

    def load(self, request: LoRARequest) -> None:
        """Have the workers hold an adapter that no request is there for yet.

        Raises:
            ReftError: what a worker met.
        """
        identity = adapter_ref(request)
        if identity is None:
            return
        self._hold(request, identity)
        if identity.digest not in self._unfinished:
            self._idle[identity.digest] = identity.engine_id
            self._idle.move_to_end(identity.digest)

    def pin(self, engine_id: int) -> None:
        """Hold the versions with this id until they are unloaded, as their slot is kept."""
        self._pinned.add(engine_id)

    def unload(self, engine_id: int) -> None:
        """Have the workers release the versions with this id that no request needs."""
        self._pinned.discard(engine_id)
        released = [digest for digest, number in self._idle.items() if number == engine_id]
        if released:
            self._release(released)

    def _hold(self, request: LoRARequest, identity: AdapterRef) -> None:
        if identity.digest in self._held:
            return
        idle = [digest for digest, number in self._idle.items() if number not in self._pinned]
        over = idle[: max(len(idle) - self._most_idle, 0)]
        if over:
            self._release(over)
        try:
            on_every_worker(self._executor, "reft_hold", request, self._ahead.get(identity.digest))
        except ReftError:
            self._release([identity.digest])  # other ranks may hold it
            raise
        else:
            self._held.add(identity.digest)
        finally:
            self._ahead.pop(identity.digest, None)

    def _release(self, digests: list[str]) -> None:
        self._executor.collective_rpc("reft_release", args=(digests,))
        for digest in digests:
            self._idle.pop(digest, None)
            self._held.discard(digest)

    def _free_id(self, identity: AdapterRef) -> int:
        # Runners find a row's adapter by its id, so two identities in one batch must never share
        # one.
        taken = set(self._ids.values())
        first = identity.engine_id & ~(IDS - 1)
        tries = (first + (identity.engine_id - first + n) % IDS for n in range(IDS))
        return next(number for number in tries if number not in taken)


# by scheduler, which reports what has finished
_admissions: WeakKeyDictionary[Any, Admission] = WeakKeyDictionary()


def admission_of(core: Any) -> Admission | None:
    """The admission of an engine core; None if adapters are off."""
    admission = _admissions.get(core.scheduler)
    if admission is None and core.vllm_config.lora_config is not None:
        # Two threads may come here first.
        return _admissions.setdefault(
            core.scheduler, Admission(core.model_executor, core.vllm_config)
        )
    return admission


def wrap_add_request(original: Any) -> Callable[..., None]:
    """Around `EngineCore.add_request`."""

    def add_request(self: Any, request: Request, request_wave: int = 0) -> None:
        admission = admission_of(self)
        try:
            if admission is not None:
                admission.admit(request)
        except Exception as exc:
            reject = getattr(self, "_send_error_outputs_to_client", None)
            if reject is None:
                raise
            logger.error("request %s: its adapter could not be loaded: %s", request.request_id, exc)
            reject([request.request_id], request.client_index)
            return
        try:
            original(self, request, request_wave)
        except Exception:  # vLLM refused it, so it will never be freed
            if admission is not None:
                admission.finished(request)
            raise

    return add_request


def wrap_add_lora(_: Any) -> Callable[..., bool]:
    """In place of `EngineCore.add_lora`: held first, so that the slot is filled from memory."""

    def add_lora(self: Any, lora_request: LoRARequest) -> bool:
        admission = admission_of(self)
        with faults_as_text():
            if admission is not None:
                admission.load(lora_request)
            on_every_worker(self.model_executor, "reft_add", lora_request)
        return True

    return add_lora


def on_every_worker(executor: Any, method: str, request: LoRARequest, *args: Any) -> None:
    """Have every worker do something with an adapter that may fail.

    Raises:
        ReftError: what the first worker met that could not.
    """
    faults: list[EngineFault | None] = executor.collective_rpc(method, args=(request, *args))
    for fault in faults:
        if fault is not None:
            raise fault.error(request.lora_path)


@contextmanager
def faults_as_text() -> Iterator[None]:
    """Raise failures with their data as text: vLLM gives a front end the text of the core's
    exceptions, and no more.
    """
    try:
        yield
    except ReftError as exc:
        raise ServiceError(EngineFault.of(exc).text()) from exc


def wrap_free_request(original: Any) -> Callable[..., Any]:
    """Around `Scheduler._free_request`, through which every request leaves."""

    def free_request(self: Any, request: Request, *args: Any, **kwargs: Any) -> Any:
        admission = _admissions.get(self)
        if admission is not None:
            admission.finished(request)
        return original(self, request, *args, **kwargs)

    return free_request


def wrap_preprocess_add_request(original: Any) -> Callable[..., Any]:
    """Around `EngineCore.preprocess_add_request`, which the core's input thread calls: its failure
    ends one request.
    """

    def preprocess(self: Any, request: Any) -> Any:
        admission = admission_of(self)
        if admission is not None:
            admission.read_ahead(request.lora_request)
        return original(self, request)

    return preprocess


def wrap_remove_lora(original: Any) -> Callable[..., bool]:
    """Around `EngineCore.remove_lora`, which frees the slot: also release what is in host
    memory.
    """

    def remove_lora(self: Any, lora_id: int) -> bool:
        removed = bool(original(self, lora_id))
        admission = admission_of(self)
        if admission is not None:
            admission.unload(lora_id)
        return removed

    return remove_lora


def wrap_pin_lora(original: Any) -> Callable[..., bool]:
    """Around `EngineCore.pin_lora`, which keeps the slot: keep what is in host memory too."""

    def pin_lora(self: Any, lora_id: int) -> bool:
        pinned = bool(original(self, lora_id))
        admission = admission_of(self)
        if pinned and admission is not None:
            admission.pin(lora_id)
        return pinned

    return pin_lora


_READERS = ThreadPoolExecutor(2, thread_name_prefix="reft-read")


def read_ahead(self: Any, lora_request: LoRARequest) -> Future[None] | None:
    """A method for `EngineCore`: what a front end calls before `add_lora`, whose reading would hold
    up the loop.
    """
    admission = admission_of(self)
    return None if admission is None else _READERS.submit(_read_ahead, admission, lora_request)


def _read_ahead(admission: Admission, request: LoRARequest) -> None:
    with faults_as_text():
        admission.read_ahead(request)


# vLLM converts the arguments of such calls by their annotations, which are strings in this file.
read_ahead.__annotations__["lora_request"] = LoRARequest
