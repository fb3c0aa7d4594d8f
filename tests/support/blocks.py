"""Code blocks of the pages. A comment before a block says how it runs: `<!-- runs -->` as it
stands; `<!-- runs: up -->` against a running `reft-serve up`; `<!-- runs: false (why) -->` not in a
test.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.support.paths import ROOT

_BLOCK = re.compile(
    r"(?:<!-- runs(?P<how>[^>]*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of a page; `how` is `yes`, `up`, `no`, or None where no comment says it."""

    page: str
    number: int
    language: str
    how: str | None
    code: str

    def __str__(self) -> str:
        return f"{self.page} {self.number}"


def blocks(page: str) -> list[Block]:
    """The blocks of a page, given by its path in the repository."""
    found = _BLOCK.finditer((ROOT / page).read_text())
    return [Block(page, n, m["language"], _how(m["how"]), m["code"]) for n, m in enumerate(found)]


def _how(said: str | None) -> str | None:
    if said is None:
        return None
    word = said.removeprefix(":").split()[:1]
    return {"false": "no", "up": "up"}[word[0]] if word else "yes"
