"""Names that adapters and aliases can have: not those that mean something else wherever a model is
named. No torch.
"""

from __future__ import annotations

import re

from reft_serve.errors import RequestInvalid

__all__ = [
    "ADAPTER_NAME",
    "ALIAS_NAME",
    "ENGINE_PREFIX",
    "PRODUCTION",
    "RESERVED",
    "check_adapter_name",
    "check_alias_name",
]

ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
ALIAS_NAME = r"^[a-z][a-z0-9-]{0,30}$"
PRODUCTION = "production"
ENGINE_PREFIX = "reft-v-"
"""Prefix of the names that engines use for versions."""
RESERVED = frozenset({"base", "ft", "latest", PRODUCTION})
"""Reserved adapter names (case-insensitive), in addition to the base model's public name."""


def check_adapter_name(
    name: str, base_name: str, tenant_name: str = "", param: str = "name"
) -> None:
    """Check the name of a new adapter or of a new version.

    Args:
        name: the adapter's.
        base_name: the base model's public name.
        tenant_name: the owner's, since others call its adapters `tenant/name`.
        param: the field that gives the name.

    Raises:
        RequestInvalid: the name is none, or it is reserved.
    """
    if not re.fullmatch(ADAPTER_NAME, name):
        raise RequestInvalid(
            f"{name[:80]!r} is not a valid adapter name: up to 63 letters, digits and . _ -", param
        )
    lowered = name.lower()
    if base_name.lower() in (lowered, f"{tenant_name}/{name}".lower()):
        raise RequestInvalid(
            f"{name!r} is the base model's name, so an adapter cannot have it", param
        )
    if lowered in RESERVED or lowered.startswith(ENGINE_PREFIX):
        words = ", ".join(sorted(RESERVED))
        raise RequestInvalid(
            f"{name!r} is reserved: an adapter cannot be called {words}, or has a name that "
            f"begins with {ENGINE_PREFIX}",
            param,
        )


def check_alias_name(name: str, base_name: str, adapter_name: str = "") -> None:
    """Check the name of an alias.

    Raises:
        RequestInvalid: the name is none, or it is the base model's.
    """
    if not re.fullmatch(ALIAS_NAME, name):
        raise RequestInvalid(
            f"{name[:80]!r} is not a valid alias: up to 31 of a-z, 0-9 and '-', starting with a "
            "letter",
            "alias",
        )
    if name == "base" or base_name.lower() in (name, f"{adapter_name}@{name}".lower()):
        raise RequestInvalid(
            f"{name!r} is the base model's name, so an alias cannot have it", "alias"
        )
