"""Whether our command line, and vLLM's behind it, takes a command. A process of its own: vLLM's
parser takes time to import.

Reads a JSON list of commands (lists of words that begin after `reft-serve`) and prints a JSON list
of faults.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import typer.main

from reft_serve.cli.app import app


def fault(words: list[str]) -> str | None:
    """What is wrong with a command, or None."""
    try:
        context, rest = typer.main.get_command(app), list(words)
        while hasattr(context, "commands"):
            name = rest.pop(0)
            if name not in context.commands:
                return f"{words}: there is no verb {name!r}"
            context = context.commands[name]
        parsed = context.make_context(words[0], rest)
    except Exception as exc:
        return f"{words}: {exc or type(exc).__name__}"
    return _vllm_fault(words, parsed) if words[0] == "serve" else None


def _vllm_fault(words: list[str], parsed: Any) -> str | None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from reft_serve.engine.launch.plan import ServeRequest, plan

    planned = plan(ServeRequest(parsed.params["model"], passed=parsed.args)).command
    flags = list(planned[planned.index("--model") :])
    try:
        validate_parsed_serve_args(
            make_arg_parser(FlexibleArgumentParser(exit_on_error=False)).parse_args(flags)
        )
    except (Exception, SystemExit) as exc:
        return f"{words}: {exc}"
    return None


if __name__ == "__main__":
    found = [fault(words) for words in json.load(sys.stdin)]
    print("\n" + json.dumps([each for each in found if each is not None]))
