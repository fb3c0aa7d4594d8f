"""The table of docs/limits.md matches the code: each row names the setting, tenant limit or
constant it comes from.
"""

from __future__ import annotations

import importlib
import re

import pytest

from reft_serve.config import EngineSettings, GatewaySettings, TenantLimits, TrainerSettings
from tests.support.paths import ROOT

_PAGE = ROOT / "docs/limits.md"
_SCOPES = {
    "request",
    "connection",
    "address",
    "key",
    "tenant",
    "process",
    "job",
    "engine",
    "installation",
}
_NUMBER = re.compile(r"^([0-9][0-9,]*(?:\.[0-9]+)?)\b")


def _rows() -> list[list[str]]:
    rows = []
    for line in _PAGE.read_text().splitlines():
        if line.startswith("|") and not line.startswith(("|---", "| resource |")):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


ROWS = _rows()


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_says_what_the_code_does(row: list[str]) -> None:
    _, bound, per, source, beyond = row
    assert per in _SCOPES, f"{per!r} is not one of {sorted(_SCOPES)}"
    assert beyond
    value = _value(source)
    stated = _NUMBER.match(bound)
    if value is None:
        assert bound.startswith("none by default"), (
            "a limit that is not set by default is written so"
        )
    else:
        assert stated is not None, "a bound begins with its number"
        assert float(stated[1].replace(",", "")) == float(value), f"the code has {value}"


def _value(source: str) -> float | None:
    """The default of what a row names: `REFT_NAME`, tenant limit `name`, or
    `reft_serve.module.NAME`.
    """
    name = re.search(r"`([^`]+)`", source)
    assert name is not None, "a row names in backticks what sets its bound"
    if source.startswith("tenant limit"):
        limits = GatewaySettings.model_fields["limits"].default
        assert name[1] in TenantLimits.model_fields
        found: float | None = getattr(limits, name[1])
        return found
    if name[1].startswith("REFT_"):
        field = name[1].removeprefix("REFT_").lower()
        for settings in (GatewaySettings, TrainerSettings, EngineSettings):
            if field in settings.model_fields:
                default: float | None = settings.model_fields[field].default
                return default
        raise AssertionError(f"no setting is called {name[1]}")
    module, _, constant = name[1].rpartition(".")
    value: float = getattr(importlib.import_module(module), constant)
    return value
