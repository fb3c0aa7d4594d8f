"""All exceptions of the product.

The caller can fix a `ClientError` (a 4xx response); the operator can fix a `ServiceError`. `code`
is stable and meant for programs; the message is one sentence for people. No HTTP and no logging
here.
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
    """Base class of all errors."""

    code: ClassVar[str] = "reft_error"


class ClientError(ReftError, ValueError):
    """The request or its input is invalid; the message says what is wrong and where."""

    code = "invalid_request"


class ServiceError(ReftError, RuntimeError):
    """The installation cannot serve the request; the message says what to change."""

    code = "service_error"


class PositionsInvalid(ClientError):
    """A position rule cannot be parsed or contradicts itself."""

    code = "positions_invalid"


class AdapterNotFound(ClientError):
    """There is no adapter at the given path."""

    code = "adapter_not_found"


class AdapterExists(ClientError):
    """The target directory is not empty; nothing was overwritten."""

    code = "adapter_exists"


MAX_ADAPTER_FAULTS = 20
MAX_FAULT_CHARACTERS = 400


class AdapterInvalid(ClientError):
    """An adapter fails its checks. `faults` lists the first ones and counts the rest."""

    code = "adapter_invalid"

    def __init__(self, where: str, faults: Iterable[str]) -> None:
        self.where = where
        self.faults = _first_faults(faults)
        super().__init__(f"adapter {where} cannot be used: " + "; ".join(self.faults))

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:
        return type(self), (self.where, self.faults)  # it may cross a process boundary


def _first_faults(faults: Iterable[str]) -> tuple[str, ...]:
    remaining = iter(faults)
    listed = [_clipped(fault) for fault in islice(remaining, MAX_ADAPTER_FAULTS + 1)]
    if len(listed) <= MAX_ADAPTER_FAULTS:
        return tuple(listed)
    rest = len(listed) - MAX_ADAPTER_FAULTS + sum(1 for _ in remaining)
    # An error built from another error's faults keeps the sentence that counts the rest.
    last = listed.pop()
    return (*listed, last if rest == 1 and _REST.fullmatch(last) else f"and {rest:,} more faults")


def _clipped(fault: str) -> str:
    return fault if len(fault) <= MAX_FAULT_CHARACTERS else fault[:MAX_FAULT_CHARACTERS] + "..."


_REST = re.compile(r"and [0-9,]+ more faults")


class AdapterUnsupported(AdapterInvalid):
    """A valid adapter uses a feature that is not supported; the fault names it."""

    code = "adapter_unsupported"


class ImportFlagMissing(ClientError):
    """A foreign save lacks required information; the message names the command-line flag that
    supplies it.
    """

    code = "import_flag_missing"


class AdapterChanged(ClientError):
    """The files of an adapter do not match its digest."""

    code = "adapter_changed"


class DataInvalid(ClientError):
    """A data file cannot be used for training. `faults` has every fault, those of a line as `line
    N: ...`; the message has the first ones and counts the rest.
    """

    code = "data_invalid"
    _IN_MESSAGE: ClassVar[int] = 10

    def __init__(self, where: str, faults: Iterable[str]) -> None:
        self.where = where
        self.faults = tuple(faults)
        first = "; ".join(self.faults[: self._IN_MESSAGE])
        rest = len(self.faults) - self._IN_MESSAGE
        more = f"; and {rest} more" if rest > 0 else ""
        super().__init__(f"data file {where} cannot be used: {first}{more}")

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:
        return type(self), (self.where, self.faults)  # it may cross a process boundary


class JobLimitExceeded(ClientError):
    """A fine-tuning job is larger, or runs longer, than its tenant's limits allow."""

    code = "job_limit"


class BaseModelInvalid(ClientError):
    """The architecture, hidden size or layers of a base model cannot be read from its directory."""

    code = "base_model_invalid"


class EngineUnsupported(ServiceError):
    """This engine, model or mode cannot serve ReFT adapters correctly; the engine does not
    start.
    """

    code = "engine_unsupported"


class RequestInvalid(ClientError):
    """A request is invalid; `param` names the field at fault, if there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class RequestQuarantined(ClientError):
    """Engines crashed while processing this request, so it is rejected for a while."""

    code = "request_quarantined"


class KeyInvalid(ClientError):
    """The API key is missing, unknown, expired or revoked."""

    code = "invalid_api_key"


class NotAllowed(ClientError):
    """A valid key lacks the scope for this request."""

    code = "insufficient_permissions"


class NotFound(ClientError):
    """The object does not exist or belongs to another tenant (indistinguishable). `param` names the
    field that named it.
    """

    code = "not_found"

    def __init__(self, message: str, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class ModelNotFound(NotFound):
    """No model of this name exists, or the caller may not use it."""

    code = "model_not_found"

    @classmethod
    def named(cls, model: str) -> ModelNotFound:
        """The error for a model name of a request."""
        return cls(f"The model {model[:200]!r} does not exist or you do not have access to it.")


class Conflict(ClientError):
    """The name is taken, or the object's state does not allow the operation."""

    code = "conflict"


class RequestTooLarge(ClientError):
    """The request body exceeds a size limit."""

    code = "request_too_large"


class HeadersTooLarge(ClientError):
    """The request line and headers exceed a limit of bytes or lines."""

    code = "headers_too_large"


class RequestTimeout(ClientError):
    """The request did not arrive in time."""

    code = "request_timeout"


class RateLimited(ClientError):
    """A limit of the tenant or of its key is exhausted. Retry after `retry_after` seconds;
    `headers` report what is left.
    """

    code = "rate_limit_exceeded"

    def __init__(
        self, message: str, retry_after: float, headers: Mapping[str, str] | None = None
    ) -> None:
        self.retry_after = retry_after
        self.headers = dict(headers or {})
        super().__init__(message)


class LeaseLost(ServiceError):
    """This worker no longer holds the job: its lease expired or the job was deleted. Stop working
    on it.
    """

    code = "lease_lost"


class Overloaded(ServiceError):
    """Every engine was busy until the request's deadline. `retry_after` is in seconds."""

    code = "overloaded"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        self.retry_after = retry_after
        super().__init__(message)


# Reasons why an engine is unavailable.
EngineTrouble = Literal[
    "new",
    "unreachable",
    "unknown_host",
    "certificate",
    "timed_out",
    "broken",
    "unhealthy",
    "key_refused",
    "unreadable",
]


class EngineUnavailable(ServiceError):
    """No engine responds. `delivered`: an engine may have received the request, and may have
    crashed on it.
    """

    code = "engine_unavailable"
    retry_after = 2.0

    def __init__(
        self, message: str, *, delivered: bool = False, trouble: EngineTrouble = "broken"
    ) -> None:
        self.delivered = delivered
        self.trouble: EngineTrouble = trouble
        super().__init__(message)


class EngineFailed(ServiceError):
    """An engine returned an error, or closed the connection in the middle of a response."""

    code = "engine_failed"


class EngineEnded(EngineFailed):
    """An engine crashed while processing the request, possibly because of it: do not simply
    retry.
    """


class TooManyConnections(ServiceError):
    """The connection limit is reached and every connection has a request in progress."""

    code = "too_many_connections"
    retry_after = 1.0


class DatabaseUnusable(ServiceError):
    """The database is unreachable or its schema does not match this version."""

    code = "database_unusable"
    retry_after = 2.0


class StoreUnusable(ServiceError):
    """The adapter store or the file store cannot be read or written."""

    code = "store_unusable"
    retry_after = 5.0


class BlobMissing(StoreUnusable):
    """A file recorded in the database is missing from the file store."""

    code = "blob_missing"
