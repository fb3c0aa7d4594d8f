"""Measure the sentences of the pages: words per sentence, long sentences, and the words that
CONTRIBUTING.md asks to avoid.

scripts/docs --prose             print a table, one row per page
scripts/docs --prose load.md     print that page's long sentences and words to avoid
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_AT_THE_DOOR = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
PAGES = (*(ROOT / name for name in _AT_THE_DOOR), *sorted((ROOT / "docs").glob("*.md")))
LONG_WORDS = 30
# The voice guide's list (CONTRIBUTING.md): each pattern with the plain word to write instead.
AVOID = {
    r"\bbut for\b": "except",
    r"\bgo(es|ing)? on\b|\bwent on\b": "continue",
    r"\b(come|comes|came) to\b": "reach, amount to",
    r"(?<!there )\b(is|are|was|were) no\b(?! longer| more)": "is not a",
    r"\bin this moment\b": "while ..., at the same time",
    r"\bwhoever\b|\bwhatever\b": "anyone who, any",
    r"\banew\b": "again",
    r"\b(tell|tells|told|telling)\b": "report, return, say",
    r"\b(of|to|by|for|with|from|than|at|about) (what|who|whom)\b(?! to\b)": "name the thing",
    r"\bwhat (is|was|were|are) (told|given|found|made)\b": "name the thing",
    r"\b(the|all|every|those) (given|found|told)\b(?! \w+s?\b)": "name the thing",
    r"\bso that (who|what)\b": "so that the ...",
    r"\blet(s)? go\b|\blet (\w+ )?go on\b": "drop, remove, resume",
    r"\breckon(s|ed)?\b": "estimate",
    r"\bwhere (it|they|there|that|none|nothing|nobody|no|one) \w+": "if",
    r"\bbesides?\b": "next to, with, in addition to",
    r"\bbe it\b": "either ... or",
    r"\bsuch an?\b": "this, a ... like that",
    r"\bof (its|their|his|our|your) own\b": "its own ...",
    r"\bof ours\b": "our",
    r"\bfor ever\b": "forever, without a limit",
    r"\bmend(s|ed|ing)?\b": "fix, repair",
    r"\bfarther\b": "further",
    r"\bsomebody\b|\bnobody\b": "someone, no one; name the role",
    r"\bheard of\b|\bheard from\b": "sends no heartbeat",
    r"\b(give|gives|gave|given) up\b|\bgiven back\b": "time out, cancel, return",
}
_CODE = re.compile(r"^```.*?^```\s*$", re.MULTILINE | re.DOTALL)
_SKIPPED = re.compile(r"^(\||#|<!--|!\[|--8<--|\s*$)")
_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+")
_END = re.compile(r"(?<=[.!?:;])\s+(?=[A-Z`*\[\d])")


@dataclass(frozen=True, slots=True)
class Prose:
    """The sentences of a page, and the phrases in it that the voice guide asks to avoid."""

    sentences: tuple[str, ...]
    avoided: tuple[str, ...]

    @property
    def lengths(self) -> list[int]:
        """Words of each sentence."""
        return [len(sentence.split()) for sentence in self.sentences]


def read(text: str) -> Prose:
    """The prose of a Markdown page: no code blocks, tables, headings or pictures."""
    paragraphs: list[list[str]] = [[]]
    for line in _CODE.sub("\n", text).splitlines():
        if _SKIPPED.match(line):
            paragraphs.append([])
            continue
        if _ITEM.match(line):
            paragraphs.append([])
        paragraphs[-1].append(_ITEM.sub("", line).strip())
    joined = [
        re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(lines)) for lines in paragraphs if lines
    ]
    sentences = tuple(
        part for paragraph in joined for part in _END.split(paragraph) if len(part.split()) > 2
    )
    plain = re.sub(r"`[^`]*`", "", " ".join(joined))
    avoided = tuple(
        match[0] for pattern in AVOID for match in re.finditer(pattern, plain, re.IGNORECASE)
    )
    return Prose(sentences, avoided)


def main() -> int:
    """Print the table, or the faults of the pages that are named."""
    named = set(sys.argv[1:])
    lengths: list[int] = []
    for page in PAGES:
        prose = read(page.read_text())
        if named and page.name not in named:
            continue
        if not prose.sentences:
            continue
        lengths += prose.lengths
        _print(page.name, prose.lengths, len(prose.avoided))
        if named:
            for sentence in sorted(prose.sentences, key=lambda sentence: -len(sentence.split())):
                if len(sentence.split()) > LONG_WORDS:
                    print(f"    {len(sentence.split())} words: {sentence}")
            print(f"    to avoid: {', '.join(prose.avoided) or 'nothing'}")
    if not named:
        _print("all pages", lengths, sum(len(read(page.read_text()).avoided) for page in PAGES))
    return 0


def _print(name: str, lengths: list[int], avoided: int) -> None:
    long = 100 * sum(length > LONG_WORDS for length in lengths) / len(lengths)
    mean = sum(lengths) / len(lengths)
    print(
        f"{name:22} {len(lengths):4} sentences {mean:5.1f} words each {long:4.0f} % long "
        f"{avoided:4} to avoid"
    )


if __name__ == "__main__":
    sys.exit(main())
