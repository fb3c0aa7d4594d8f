"""Folders that tests read from."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
# Large or third-party data that lies beside the repository; tests marked `shared` are skipped
# without it.
SHARED = ROOT.parent / "shared"
