"""A request enters the scheduler only once every worker holds its adapter, and they hold it until it is finished.

A failure in the middle of a step would end the engine for everyone; here it ends one request. Whether files vanish or
change afterwards is no matter.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.request import Request

from reft_serve.engine.identity import IDS, Identity, identity_of, with_engine_id
from reft_serve.errors import ServiceError

__all__ = ["Admission", "adding", "admitting", "noting_finished"]

logger = logging.getLogger("vllm.reft_serve")


class Admission:
    """The versions that the workers of one engine hold.

    Args:
        executor: vLLM's executor, asked to hold versions with unfinished requests and, from time to time, to let go.
        idle: how many versions without requests stay held, least recently used first out (vLLM's --max-cpu-loras).
    """

    def __init__(self, executor: Any, idle: int) -> None:
        self._executor, self._most_idle = executor, idle
        self._unfinished: Counter[str] = Counter()
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._partly_held: list[str] = []
        # By identity: two strengths of one version are two adapters to a batch.
        self._requests: Counter[Identity] = Counter()
        self._ids: dict[Identity, int] = {}

    def admit(self, request: Request) -> None:
        """Have the workers hold the request's adapter, and give the request an id that no other identity has.

        Raises:
            ServiceError: what a worker met; the request must not be scheduled then.
        """
        identity = identity_of(request.lora_request)
        if identity is None:
            return
        if identity.digest in self._idle:
            del self._idle[identity.digest]
        elif not self._unfinished[identity.digest]:
            released = [self._idle.popitem(last=False)[0] for _ in range(len(self._idle) - self._most_idle)]
            try:
                on_every_worker(self._executor, "reft_hold", request.lora_request, released + self._partly_held)
            except ServiceError:
                # Other ranks may hold it; they let go of it with the next that is held.
                self._partly_held = [identity.digest]
                raise
            self._partly_held = []
        self._unfinished[identity.digest] += 1
        self._requests[identity] += 1
        if identity not in self._ids:
            self._ids[identity] = self._free_id(identity)
        request.lora_request = with_engine_id(request.lora_request, self._ids[identity])

    def finished(self, request: Request) -> None:
        """Note that a request which was admitted is over, however it ended."""
        identity = identity_of(request.lora_request)
        if identity is None:
            return
        self._requests[identity] -= 1
        if self._requests[identity] <= 0:
            del self._requests[identity], self._ids[identity]
        self._unfinished[identity.digest] -= 1
        if self._unfinished[identity.digest] <= 0:
            del self._unfinished[identity.digest]
            self._idle[identity.digest] = None

    def _free_id(self, identity: Identity) -> int:
        # Runners find a row's adapter by its id, so two identities in one batch must never share one.
        taken, first = set(self._ids.values()), identity.engine_id & ~(IDS - 1)
        tries = (first + (identity.engine_id - first + n) % IDS for n in range(IDS))
        return next(number for number in tries if number not in taken)


def admitting(original: Any) -> Callable[..., None]:
    """Around `EngineCore.add_request`."""

    def add_request(self: Any, request: Request, request_wave: int = 0) -> None:
        admission = self.scheduler.__dict__.get("_reft_admission")
        if admission is None and request.lora_request is not None:
            lora = self.vllm_config.lora_config
            admission = self.scheduler._reft_admission = Admission(self.model_executor, lora.max_cpu_loras)
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


def adding(_: Any) -> Callable[..., bool]:
    """In place of `EngineCore.add_lora`."""

    def add_lora(self: Any, lora_request: LoRARequest) -> bool:
        on_every_worker(self.model_executor, "reft_add", lora_request)
        return True

    return add_lora


def on_every_worker(executor: Any, method: str, *args: Any) -> None:
    """Have every worker do something that may fail.

    Raises:
        ServiceError: with what the first worker said that could not.
    """
    fault = next((fault for fault in executor.collective_rpc(method, args=args) if fault is not None), None)
    if fault is not None:
        raise ServiceError(fault)


def noting_finished(original: Any) -> Callable[..., Any]:
    """Around `Scheduler._free_request`, through which every request leaves."""

    def free_request(self: Any, request: Request, *args: Any, **kwargs: Any) -> Any:
        admission = self.__dict__.get("_reft_admission")
        if admission is not None:
            admission.finished(request)
        return original(self, request, *args, **kwargs)

    return free_request
