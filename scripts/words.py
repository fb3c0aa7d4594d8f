"""Find the words that CONTRIBUTING.md asks to avoid, and print each place.

.venv/bin/python scripts/words.py                 settings, routes, errors, events, help and metrics
.venv/bin/python scripts/words.py docstrings      the other docstrings
.venv/bin/python scripts/words.py README.md ...   these pages
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prose import AVOID, read

ROOT = Path(__file__).parents[1]
# The demo's stories are data, not sentences of ours.
_STORIES = ("behaviours.py", "pretrain.py")
_FIRST = re.compile(r"^(What|Who|Whether|Whoever|Whatever|Let|How|That)\b(?! to\b)")
_METHODS = {"get", "post", "put", "patch", "delete", "head", "api_route", "command", "callback"}


@dataclass(frozen=True, slots=True)
class Text:
    """A string of the code: where it is, and whether people read it without reading the code."""

    path: Path
    line: int
    text: str
    shown: bool

    @property
    def avoided(self) -> list[str]:
        """The phrases in it that the voice guide asks to avoid."""
        plain = re.sub(r"`[^`]*`", "", " ".join(self.text.split()))
        words = [
            match[0] for pattern in AVOID for match in re.finditer(pattern, plain, re.IGNORECASE)
        ]
        first = _FIRST.match(plain)
        return words + ([first[0]] if first else [])


def texts(package: Path = ROOT / "reft_serve") -> Iterator[Text]:
    """Every docstring of the package, and every other string of three words or more."""
    for path in sorted(package.rglob("*.py")):
        if path.name not in _STORIES:
            yield from _texts(path)


def _texts(path: Path) -> Iterator[Text]:
    tree = ast.parse(path.read_text())
    docstrings: dict[int, bool] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings[id(first.value)] = _is_shown(node, path)
    for node in _strings(tree):
        text = _text(node)
        if id(node) in docstrings:
            yield Text(path, node.lineno, text, docstrings[id(node)])
        elif len(text.split()) >= 3:
            yield Text(path, node.lineno, text, shown=True)


def _is_shown(node: ast.AST, path: Path) -> bool:
    """Whether a docstring becomes a route's description or a command's help."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    if path.stem.startswith("cli_") or path.parent.name == "cli":
        return not node.name.startswith("_")
    calls = (each.func for each in node.decorator_list if isinstance(each, ast.Call))
    return any(isinstance(call, ast.Attribute) and call.attr in _METHODS for call in calls)


def _strings(tree: ast.AST) -> Iterator[ast.Constant | ast.JoinedStr]:
    """The strings of a tree, each formatted one whole."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.JoinedStr):
            yield node
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                yield node
        else:
            yield from _strings(node)


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(
        str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
    )


def main() -> int:
    """Print each place, and fail if there is one."""
    arguments = sys.argv[1:]
    places = (
        _in_code(shown=not arguments) if arguments in ([], ["docstrings"]) else _in_pages(arguments)
    )
    count = 0
    for place in places:
        print(place)
        count += 1
    print(f"{count} to avoid")
    return min(count, 1)


def _in_code(*, shown: bool) -> Iterator[str]:
    for text in texts():
        for phrase in text.avoided if text.shown is shown else ():
            yield f"{text.path.relative_to(ROOT)}:{text.line}: {phrase}: {text.text[:160]}"


def _in_pages(names: list[str]) -> Iterator[str]:
    for name in names:
        for phrase in read((ROOT / name).read_text()).avoided:
            yield f"{name}: {phrase}"


if __name__ == "__main__":
    sys.exit(main())
