"""Nothing that clients, deployments or saved files rely on changes by accident."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.contract import PATH, contract, without_prose

KEPT: dict[str, Any] = json.loads(PATH.read_text())


@pytest.fixture(scope="module")
def today() -> dict[str, Any]:
    return contract()


def differences(kept: Any, now: Any, where: str) -> Iterator[str]:
    """Each place at which two JSON values differ."""
    if isinstance(kept, dict) and isinstance(now, dict):
        for key in sorted(kept.keys() | now.keys()):
            if key not in now:
                yield f"{where} / {key} is gone"
            elif key not in kept:
                yield f"{where} / {key} is new"
            else:
                yield from differences(kept[key], now[key], f"{where} / {key}")
    elif kept != now:
        yield f"{where} was {kept!r} and is {now!r}"


@pytest.mark.parametrize("part", sorted(KEPT))
def test_the_contract_is_the_one_that_was_kept(part: str, today: dict[str, Any]) -> None:
    found = list(differences(KEPT[part], today[part], part))
    assert not found, "if this is meant: python -m tests.support.contract\n" + "\n".join(found[:20])


def test_the_snapshot_has_every_part(today: dict[str, Any]) -> None:
    assert sorted(today) == sorted(KEPT)
    assert all(KEPT.values())


def test_prose_is_left_out_and_a_field_with_its_name_is_not() -> None:
    schema = {
        "title": "T",
        "description": "D",
        "type": "object",
        "properties": {"title": {"description": "D"}},
    }
    assert without_prose(schema) == {"type": "object", "properties": {"title": {}}}
