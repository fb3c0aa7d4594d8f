"""The faults of one data file, as sentences with line numbers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

__all__ = ["MAX_FAULTS", "MAX_FAULT_CHARACTERS", "Faults", "kind_of", "sentence"]

MAX_FAULTS = 1000
MAX_FAULT_CHARACTERS = 400
_MOST_OF_A_ROW = 1000
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
}
_WANTED = {
    "string_type": "must be text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "float_type": "must be a number",
}


class Faults:
    """The faults of one file: the first thousand are listed, the rest counted."""

    def __init__(self) -> None:
        self._noted: list[tuple[int | None, str]] = []
        self._untold = 0

    def __bool__(self) -> bool:
        return bool(self._noted)

    def add(self, fault: str, line: int | None = None) -> None:
        """Note a fault of a line, or of the file as a whole."""
        if len(self._noted) < MAX_FAULTS:
            self._noted.append(
                (
                    line,
                    fault
                    if len(fault) <= MAX_FAULT_CHARACTERS
                    else fault[:MAX_FAULT_CHARACTERS] + "...",
                )
            )
        else:
            self._untold += 1

    def add_errors(self, error: ValidationError, line: int) -> None:
        """Add pydantic's errors about a row. Those beyond the limit are only counted, because each
        takes memory.
        """
        count = error.error_count()
        if count <= _MOST_OF_A_ROW and len(self._noted) < MAX_FAULTS:
            for each in error.errors(include_url=False):
                self.add(sentence(each), line)
        elif len(self._noted) < MAX_FAULTS:
            self.add(f"has {count:,} faults", line)
        else:
            self._untold += count

    def sentences(self) -> list[str]:
        """One for each fault, in the order of their lines; those of the file as a whole at the
        end.
        """
        ordered = sorted(self._noted, key=lambda fault: (fault[0] is None, fault[0] or 0))
        listed = [fault if line is None else f"line {line}: {fault}" for line, fault in ordered]
        return listed + ([f"{self._untold:,} more faults are not listed"] if self._untold else [])


def kind_of(value: object) -> str:
    """JSON's name of a value's type, with its article."""
    return _KINDS.get(type(value), "null")


def sentence(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors about a row, in our words: `messages[2].role must be ...`."""
    kind = error["type"]
    loc = error["loc"]
    value = error["input"]
    if kind in ("missing", "extra_forbidden"):
        holder = f"{_path(loc[:-1])} has".strip()
        return (
            f'{holder} no "{loc[-1]}"'
            if kind == "missing"
            else f"{holder} an unknown key {str(loc[-1])[:40]!r}"
        )
    if kind == "finite_number":
        text = "is too large a number"
    elif kind == "value_error":
        text = str(error["ctx"]["error"])
    elif kind == "literal_error":
        text = f"must be {error['ctx']['expected']}, not {_shown(value)}"
    elif kind in _WANTED:
        text = f"{_WANTED[kind]}, not {kind_of(value)}"
    else:
        text = f"is wrong: {error['msg']}"
    return f"{_path(loc)} {text}".strip()


def _path(loc: tuple[int | str, ...]) -> str:
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc
    ).removeprefix(".")


def _shown(value: object) -> str:
    return (
        repr(value[:40])
        if isinstance(value, str)
        else str(value)
        if isinstance(value, int | float)
        else kind_of(value)
    )
