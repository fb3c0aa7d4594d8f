"""The fake engine as a process.

python -m tests.support.gateway.engine_process PORT TOKEN_SECONDS [FIRST_SECONDS]
"""

from __future__ import annotations

import gc
import sys

import uvicorn

from reft_serve.testing import FakeEngine


def main(port: int, token_seconds: float, first_seconds: float = 0.0) -> None:
    """Serve until it is ended."""
    engine = FakeEngine(token_seconds=token_seconds, first_seconds=first_seconds, remember=False)

    app = engine.app
    gc.freeze()
    uvicorn.run(app, port=port, log_level="error")


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(float, sys.argv[2:]))
