"""A request enters the scheduler only once every worker could load its adapter.

A failure in the middle of a step would end the engine for everyone; here it ends one request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from vllm.v1.request import Request

from reft_serve.engine.identity import identity_of

__all__ = ["loading_first"]

logger = logging.getLogger("vllm.reft_serve")


def loading_first(original: Any) -> Callable[..., None]:
    """Around `EngineCore.add_request`: load an adapter that no request has used yet before its first one is queued."""

    def add_request(self: Any, request: Request, request_wave: int = 0) -> None:
        identity = identity_of(request.lora_request)
        admitted: set[str] = self.__dict__.setdefault("_reft_admitted", set())
        if identity is not None and identity.digest not in admitted:
            try:
                self.model_executor.add_lora(request.lora_request)
            except Exception as exc:  # whatever a worker met: this request fails, the engine goes on
                reject = getattr(self, "_send_error_outputs_to_client", None)
                if reject is None:
                    raise
                logger.error("request %s: its adapter could not be loaded: %s", request.request_id, exc)
                reject([request.request_id], request.client_index)
                return
            admitted.add(identity.digest)
        original(self, request, request_wave)

    return add_request
