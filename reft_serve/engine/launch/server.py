"""vLLM's OpenAI server with keys of the environment: as `--api-key`, every process list would show
them.

vLLM reads one key from VLLM_API_KEY; two at once, as a change of keys needs, it takes as arguments
only.
"""

from __future__ import annotations

import sys

from vllm.entrypoints.launchers.api_server import entry

from reft_serve.config import ServeSettings, read_settings

__all__ = ["main"]


def main() -> None:
    """Run until a signal says to end."""
    keys = read_settings(ServeSettings).engine_keys
    if keys:
        # inside this process alone: the kernel's list keeps what it was started with
        sys.argv += ["--api-key", *keys]
    entry.main()


if __name__ == "__main__":
    main()
