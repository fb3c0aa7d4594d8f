"""Flags for vLLM, read without its parser."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from reft_serve.errors import ClientError

__all__ = ["check_no_secret", "flag_values"]

# Flags of vLLM whose value is a secret, and the variables that take their place.
_SECRETS = {
    "--api-key": "set REFT_ENGINE_KEY (and REFT_ENGINE_KEY_NEXT for a second key)",
    "--hf-token": "set HF_TOKEN",
}


def flag_values(passed: Sequence[str]) -> dict[str, str]:
    """Each flag, spelt with dashes, and the value after its `=`, or else the argument that follows
    it.
    """
    values = {}
    for argument, following in zip_longest(passed, passed[1:], fillvalue=""):
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            values[flag.replace("_", "-")] = value if equals else following
    return values


def check_no_secret(passed: Sequence[str]) -> None:
    """Refuse a secret among the arguments, which every user of the machine can read in the list of
    processes.

    Raises:
        ClientError: a flag has a secret as its value; the message names the variable to use
            instead.
    """
    for flag, value in flag_values(passed).items():
        if flag in _SECRETS and value and not value.startswith("-"):
            raise ClientError(
                f"{flag} would show the secret in the list of processes: {_SECRETS[flag]}"
            )
