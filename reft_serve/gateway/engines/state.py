"""State of an engine: usable, or one of a fixed set of reasons, for the log, the admin's list and a
metric.
"""

from __future__ import annotations

import logging

from reft_serve.errors import EngineTrouble
from reft_serve.gateway.engines.urls import without_password
from reft_serve.observability import ENGINE_UNUSABLE, ENGINE_UP

__all__ = ["EngineState"]

_log = logging.getLogger(__name__)
_SENTENCES: dict[EngineTrouble, str] = {
    "new": "it has not been probed yet",
    "unreachable": "nothing accepts connections at its address",
    "unknown_host": "its host name cannot be resolved",
    "certificate": "its TLS certificate was rejected",
    "timed_out": "it did not respond in time",
    "broken": "it closed the connection before responding",
    "unhealthy": "its health check failed",
    "key_refused": "it rejected the key (REFT_ENGINE_KEY)",
    "unreadable": "its list of models cannot be read",
}


class EngineState:
    """The state of one engine. Each change is logged once.

    Attributes:
        trouble: why the engine cannot be used; None if it can.
        url: the engine's, without a password.
    """

    def __init__(self, name: str, url: str) -> None:
        self.trouble: EngineTrouble | None = "new"
        self.url = without_password(url)
        self._name = name

    @property
    def sentence(self) -> str | None:
        """`trouble` as a sentence."""
        return None if self.trouble is None else _SENTENCES[self.trouble]

    def set(self, trouble: EngineTrouble | None, base: str) -> None:
        """Note how the engine is now.

        Args:
            trouble: why it cannot be used; None if it can.
            base: its base model, as it names it.
        """
        ENGINE_UP.labels(self._name).set(trouble is None)
        if trouble == self.trouble:
            return
        first = self.trouble == "new"
        before = self.trouble
        self.trouble = trouble
        self._remove(before)
        data = {"engine": self._name, "url": self.url}
        if trouble is None:
            _log.info(
                "found an engine" if first else "an engine is back",
                extra={"data": data | {"base_model": base}},
            )
            return
        ENGINE_UNUSABLE.labels(self._name, trouble).set(1)
        data |= {"reason": trouble}
        _log.warning("an engine is unusable: %s", self.sentence, extra={"data": data})

    def remove(self) -> None:
        """Take the engine out of the metrics."""
        self._remove(self.trouble)

    def _remove(self, trouble: EngineTrouble | None) -> None:
        if trouble is not None and trouble != "new":
            ENGINE_UNUSABLE.remove(self._name, trouble)
