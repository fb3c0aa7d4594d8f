"""Measure how dense the package's code is, and fail above the limits: see `scripts/density`."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "reft_serve"
CHARACTERS = 38
PARALLEL = 3
_NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip


def code_lines(text: str) -> list[str]:
    """The lines that hold code: no blank line, comment or docstring. Indentation is stripped."""
    docstrings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    held = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in _NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    lines = text.splitlines()
    return [lines[number - 1].strip() for number in sorted(held - docstrings)]


def parallel_assignments(text: str) -> int:
    """Assignments such as `a, b = 1, 2`, which put two statements on one line."""
    return sum(
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
        for node in ast.walk(ast.parse(text))
    )


def main() -> int:
    """Print the three figures with their limits."""
    texts = [path.read_text() for path in sorted(PACKAGE.rglob("*.py"))]
    lines = [line for text in texts for line in code_lines(text)]
    figures = (
        ("characters per line of code", sum(map(len, lines)) / len(lines), CHARACTERS),
        (
            "parallel assignments per 1,000 lines",
            1000 * sum(map(parallel_assignments, texts)) / len(lines),
            PARALLEL,
        ),
        ("'# fmt: skip' comments", sum(text.count("# fmt: skip") for text in texts), 0),
    )
    for name, figure, limit in figures:
        print(f"{figure:6.1f} {name} (at most {limit}){'' if figure <= limit else ': too many'}")
    return int(any(figure > limit for _, figure, limit in figures))


if __name__ == "__main__":
    sys.exit(main())
