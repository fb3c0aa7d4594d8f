"""Show the vLLM functions that the plugin wraps, and how they differ between two vLLM versions.

A version is a folder that holds the package `vllm`: a site-packages folder, or an unpacked wheel.
vLLM is read as text and never imported, so the new version need not be installed:

  pip download --no-deps --dest wheels vllm==NEW && unzip -q -d new wheels/vllm-*.whl
  scripts/seams --diff .venv/lib/python3.*/site-packages new
"""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from reft_serve.engine.seams import SEAMS, Seam, fingerprint

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def source(root: Path, seam: Seam) -> str | None:
    """The source text of a seam's function under a folder, as `inspect.getsource` gives it; None if
    there is none.
    """
    module, _, owner = seam.owner.partition(":")
    path = root.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        return None
    text = file.read_text()
    body: list[ast.stmt] = ast.parse(text).body
    if owner:
        body = next(
            (node.body for node in body if isinstance(node, ast.ClassDef) and node.name == owner),
            [],
        )
    named = [node for node in body if isinstance(node, _Function) and node.name == seam.name]
    function = named[-1] if named else None  # after its overloads
    if function is None:
        return None
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    return "".join(text.splitlines(keepends=True)[first - 1 : function.end_lineno])


def differences(old: Path, new: Path) -> Iterator[tuple[Seam, str, str]]:
    """Each seam, whether its function is `same`, `changed`, `moved or removed` or `missing in OLD`,
    and a unified diff.
    """
    # one row of each function
    for seam in {(seam.owner, seam.name): seam for seam in SEAMS}.values():
        before, after = source(old, seam), source(new, seam)
        if before is None:
            yield seam, "missing in OLD", ""
        elif after is None:
            yield seam, "moved or removed", ""
        elif before == after:
            yield seam, "same", ""
        else:
            lines = difflib.unified_diff(
                before.splitlines(), after.splitlines(), "old", "new", lineterm="", n=2
            )
            yield seam, "changed", "\n".join(lines)


def main() -> int:
    """Run the command; the exit status of --diff is 1 if a function changed."""
    parser = argparse.ArgumentParser(
        prog="scripts/seams",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--diff", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two folders that hold `vllm`"
    )
    parser.add_argument(
        "--brief", action="store_true", help="with --diff: list what changed, without the lines"
    )
    arguments = parser.parse_args()
    if arguments.diff is None:
        for seam in SEAMS:
            print(f"{seam}\n    {seam.wrapper}: {seam.why}")
            if seam.upstream:
                print(f"    works around: {seam.upstream}")
        return 0
    old, new = arguments.diff
    for root in (old, new):
        if not (root / "vllm" / "__init__.py").is_file():
            parser.error(f"{root} holds no package vllm")
    results = list(differences(old, new))
    for seam, state, diff in results:
        if state != "same":
            after = source(new, seam)
            print(
                f"{state}: {seam} ({seam.wrapper})"
                + (f", now {fingerprint(after)}" if after else "")
            )
            if diff and not arguments.brief:
                print(diff, end="\n\n")
    changed = [state for _, state, _ in results if state != "same"]
    print(
        f"{len(results) - len(changed)} of {len(results)} wrapped functions are the same, "
        f"{len(changed)} are not"
    )
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
