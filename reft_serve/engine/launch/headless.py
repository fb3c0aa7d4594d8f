"""A node of an engine that is larger than one machine: it computes with the group's leader, and
serves no HTTP itself.

vLLM starts one by its console command (`vllm serve --headless`), which its CPU build does not have.
"""

from __future__ import annotations

from vllm.entrypoints.cli.serve import run_headless
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser

__all__ = ["main"]


def main() -> None:
    """Run until the leader ends, or a signal says to end."""
    cli_env_setup()
    parser = make_arg_parser(
        FlexibleArgumentParser(description="Run a node without an HTTP server.")
    )
    arguments = parser.parse_args()
    arguments.api_server_count = 0
    validate_parsed_serve_args(arguments)
    run_headless(arguments)


if __name__ == "__main__":
    main()
