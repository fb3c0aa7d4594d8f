"""Every failure that the product can name.

`ClientError`: the caller can mend it (becomes a 4xx). `ServiceError`: the operator can. `code` is stable and meant for
programs; the message is one sentence for people. No HTTP and no logging here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import ClassVar, Literal

__all__ = [
    "MAX_ADAPTER_FAULTS",
    "MAX_FAULT_CHARACTERS",
    "AdapterChanged",
    "AdapterExists",
    "AdapterInvalid",
    "AdapterNotFound",
    "AdapterUnsupported",
    "BaseModelInvalid",
    "BlobMissing",
    "ClientError",
    "Conflict",
    "DataInvalid",
    "DatabaseUnusable",
    "EngineEnded",
    "EngineFailed",
    "EngineTrouble",
    "EngineUnavailable",
    "EngineUnsupported",
    "HeadersTooLarge",
    "ImportFlagMissing",
    "KeyInvalid",
    "LeaseLost",
    "ModelNotFound",
    "NotAllowed",
    "NotFound",
    "Overloaded",
    "PositionsInvalid",
    "RateLimited",
    "ReftError",
    "RequestInvalid",
    "RequestQuarantined",
    "RequestTimeout",
    "RequestTooLarge",
    "ServiceError",
    "StoreUnusable",
    "TooManyConnections",
]


class ReftError(Exception):
    """Base of all named failures."""

    code: ClassVar[str] = "reft_error"


class ClientError(ReftError, ValueError):
    """The caller gave something that cannot be used; the message says what and where."""

    code = "invalid_request"


class ServiceError(ReftError, RuntimeError):
    """The installation cannot do what it was asked to; the message says what to change."""

    code = "service_error"


class PositionsInvalid(ClientError):
    """A position rule that cannot be read or that contradicts itself."""

    code = "positions_invalid"


class AdapterNotFound(ClientError):
    """There is no adapter at the place that was named."""

    code = "adapter_not_found"


class AdapterExists(ClientError):
    """The target directory already holds something; nothing was overwritten."""

    code = "adapter_exists"


MAX_ADAPTER_FAULTS = 20
MAX_FAULT_CHARACTERS = 400


class AdapterInvalid(ClientError):
    """An adapter that fails its checks. `faults` lists the first faults found, not only one, and counts the rest."""

    code = "adapter_invalid"

    def __init__(self, where: str, faults: Iterable[str]) -> None:
        self.where = where
        self.faults = _first_faults(faults)
        super().__init__(f"adapter {where} cannot be used: " + "; ".join(self.faults))

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:
        return type(self), (self.where, self.faults)  # it may come from a worker's process


def _first_faults(faults: Iterable[str]) -> tuple[str, ...]:
    found = iter(faults)
    listed = [_clipped(fault) for fault in islice(found, MAX_ADAPTER_FAULTS + 1)]
    if len(listed) <= MAX_ADAPTER_FAULTS:
        return tuple(listed)
    rest = len(listed) - MAX_ADAPTER_FAULTS + sum(1 for _ in found)
    # An error that is made of another's faults keeps the sentence that counts the rest.
    last = listed.pop()
    return (*listed, last if rest == 1 and _REST.fullmatch(last) else f"and {rest:,} more faults")


def _clipped(fault: str) -> str:
    return fault if len(fault) <= MAX_FAULT_CHARACTERS else fault[:MAX_FAULT_CHARACTERS] + "..."


_REST = re.compile(r"and [0-9,]+ more faults")


class AdapterUnsupported(AdapterInvalid):
    """A sound adapter that asks for something we do not serve; the fault names it."""

    code = "adapter_unsupported"


class ImportFlagMissing(ClientError):
    """A foreign save does not record something that must be known; the message names the flag that gives it."""

    code = "import_flag_missing"


class AdapterChanged(ClientError):
    """The files of an adapter are not those that its digest names."""

    code = "adapter_changed"


class DataInvalid(ClientError):
    """A data file that cannot be trained on. `faults` has every fault found, those of a line as `line N: ...`; the message
    tells the first of them and counts the rest.
    """

    code = "data_invalid"
    _TOLD: ClassVar[int] = 10

    def __init__(self, where: str, faults: Iterable[str]) -> None:
        self.where = where
        self.faults = tuple(faults)
        told = "; ".join(self.faults[: self._TOLD])
        rest = len(self.faults) - self._TOLD
        more = f"; and {rest} more" if rest > 0 else ""
        super().__init__(f"data file {where} cannot be used: {told}{more}")

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:
        return type(self), (self.where, self.faults)  # it may come from a worker's process


class JobLimitExceeded(ClientError):
    """A fine-tuning job that is larger, or takes longer, than its tenant's limits allow."""

    code = "job_limit"


class BaseModelInvalid(ClientError):
    """A base model's directory from which its architecture, width and layers cannot be read."""

    code = "base_model_invalid"


class EngineUnsupported(ServiceError):
    """This engine, model or mode cannot serve ReFT adapters correctly, so it is refused at start."""

    code = "engine_unsupported"


class RequestInvalid(ClientError):
    """A request that cannot be carried out as it is; `param` names the field at fault, where there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class RequestQuarantined(ClientError):
    """Engines have ended while they processed this request, so it reaches no engine for a while."""

    code = "request_quarantined"


class KeyInvalid(ClientError):
    """No API key, or one that is not known, has expired or was revoked."""

    code = "invalid_api_key"


class NotAllowed(ClientError):
    """A sound key that may not do this."""

    code = "insufficient_permissions"


class NotFound(ClientError):
    """There is no such thing, or it is somebody else's: the two look the same. `param` names the field that named it."""

    code = "not_found"

    def __init__(self, message: str, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class ModelNotFound(NotFound):
    """No model of this name, or not one of the caller's."""

    code = "model_not_found"

    @classmethod
    def named(cls, model: str) -> ModelNotFound:
        """The error for a model name of a request."""
        return cls(f"The model {model[:200]!r} does not exist or you do not have access to it.")


class Conflict(ClientError):
    """The name is taken, or the thing is in a state that does not allow this."""

    code = "conflict"


class RequestTooLarge(ClientError):
    """More bytes than are taken."""

    code = "request_too_large"


class HeadersTooLarge(ClientError):
    """A request line and headers with more bytes or lines than are taken."""

    code = "headers_too_large"


class RequestTimeout(ClientError):
    """The request did not arrive in time."""

    code = "request_timeout"


class RateLimited(ClientError):
    """A limit of the tenant or of its key is used up; trying again makes sense after `retry_after` seconds. `headers` say
    how much of which limit is left.
    """

    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after: float, headers: Mapping[str, str] | None = None) -> None:
        self.retry_after = retry_after
        self.headers = dict(headers or {})
        super().__init__(message)


class LeaseLost(ServiceError):
    """The job is not this worker's any more: its lease ran out and another has it, or it was deleted. Stop working on it."""

    code = "lease_lost"


class Overloaded(ServiceError):
    """Every engine was busy until the request's deadline; `retry_after` is in seconds."""

    code = "overloaded"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        self.retry_after = retry_after
        super().__init__(message)


# Why an engine cannot be used.
EngineTrouble = Literal[
    "new", "unreachable", "unknown_host", "certificate", "timed_out", "broken", "unhealthy", "key_refused", "unreadable"
]  # fmt: skip


class EngineUnavailable(ServiceError):
    """No engine answers. `delivered`: one may have had the request, and may have ended because of it. `trouble`: why."""

    code = "engine_unavailable"
    retry_after = 2.0

    def __init__(self, message: str, *, delivered: bool = False, trouble: EngineTrouble = "broken") -> None:
        self.delivered = delivered
        self.trouble: EngineTrouble = trouble
        super().__init__(message)


class EngineFailed(ServiceError):
    """An engine answered with a failure of its own, or stopped in the middle of an answer."""

    code = "engine_failed"


class EngineEnded(EngineFailed):
    """An engine ended while it processed the request, perhaps because of it: the request must not simply be repeated."""


class TooManyConnections(ServiceError):
    """Every connection that the gateway takes has a request under way."""

    code = "too_many_connections"
    retry_after = 1.0


class DatabaseUnusable(ServiceError):
    """The database cannot be reached, or is not one that this version can use."""

    code = "database_unusable"
    retry_after = 2.0


class StoreUnusable(ServiceError):
    """The adapter store or the file store cannot be read or written."""

    code = "store_unusable"
    retry_after = 5.0


class BlobMissing(StoreUnusable):
    """A file that a row names is not in the file store."""

    code = "blob_missing"
