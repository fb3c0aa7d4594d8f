"""Places that tests read from, and what every test process needs."""

from __future__ import annotations

from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
# Large or third-party data that lies beside the repository; tests marked `shared` are skipped without it.
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)
