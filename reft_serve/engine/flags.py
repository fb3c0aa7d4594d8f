"""Flags that are passed on to vLLM, as far as one can tell without its parser. Imports nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

__all__ = ["flag_values"]


def flag_values(passed: Sequence[str]) -> dict[str, str]:
    """Each flag, spelt with dashes, and the value after its `=`, or else whatever argument follows it."""
    found = {}
    for argument, following in zip_longest(passed, passed[1:], fillvalue=""):
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            found[flag.replace("_", "-")] = value if equals else following
    return found
