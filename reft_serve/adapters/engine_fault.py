"""Why an engine did not take an adapter, as data: its processes and its answers carry it, and a
gateway reads it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from reft_serve.errors import (
    AdapterChanged,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    ClientError,
    ReftError,
    ServiceError,
)

__all__ = ["ALREADY_LOADED", "CHAT_TEMPLATE", "EngineFault"]

#: The `type` of an engine's answer if the adapter's name is taken.
ALREADY_LOADED = "AdapterAlreadyLoaded"
#: The `param` of an engine's answer if its base model has no chat template.
CHAT_TEMPLATE = "chat_template"

_OF_ADAPTERS = {cls.__name__: cls for cls in (AdapterInvalid, AdapterUnsupported)}
_OF_FILES = {cls.__name__: cls for cls in (AdapterNotFound, AdapterChanged)}
_MARK = "reft-serve fault: "


@dataclass(frozen=True, slots=True)
class EngineFault:
    """A failure by the name of its class, its message, and every fault of the adapter if it has
    any.
    """

    type: str = ""
    message: str = ""
    faults: tuple[str, ...] = ()
    param: str | None = None

    @property
    def already_loaded(self) -> bool:
        """True if the engine holds an adapter of this name."""
        # The second is vLLM's own type, from an engine whose plugin is older than the gateway. A
        # gateway can cause only one of the errors of this type: a name that is already in use.
        return self.type in (ALREADY_LOADED, "InvalidUserInput")

    @classmethod
    def of(cls, exc: Exception) -> EngineFault:
        """A failure of an engine's process as data."""
        faults = exc.faults if isinstance(exc, AdapterInvalid) else ()
        return cls(type(exc).__name__, str(exc) or type(exc).__name__, faults)

    def error(self, where: str) -> ReftError:
        """The failure again. `where` names the adapter as its caller does."""
        if (of_adapters := _OF_ADAPTERS.get(self.type)) is not None:
            return of_adapters(where, self.faults)
        of_files: type[ClientError] | None = _OF_FILES.get(self.type)
        return ServiceError(self.message) if of_files is None else of_files(self.message)

    def text(self) -> str:
        """For a channel that carries text alone, as vLLM's does for exceptions."""
        return _MARK + json.dumps(asdict(self))

    @classmethod
    def in_text(cls, text: str) -> EngineFault | None:
        """The fault in `text`, without the prefixes of vLLM's channel."""
        _, mark, data = text.partition(_MARK)
        return cls._read(json.loads(data)) if mark else None

    @classmethod
    def in_answer(cls, content: bytes) -> EngineFault:
        """The fault in an engine's error response, in any of vLLM's shapes."""
        try:
            body = json.loads(content)
            error = body.get("error", body)
            return cls._read(error) if isinstance(error, dict) else cls(message=str(error))
        except (ValueError, AttributeError):
            return cls(message=content[:500].decode(errors="replace"))

    @classmethod
    def _read(cls, data: dict[str, object]) -> EngineFault:
        param = data.get("param")
        faults = data.get("faults")
        return cls(
            type=str(data.get("type", "")),
            message=str(data.get("message", data)),
            faults=tuple(map(str, faults)) if isinstance(faults, list) else (),
            param=None if param is None else str(param),
        )
