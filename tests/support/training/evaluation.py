"""Reading what `evaluate` prints."""

from __future__ import annotations


def table(stdout: str) -> list[list[str]]:
    """The cells of the printed table."""
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in stdout.splitlines()
        if "│" in line
    ]
