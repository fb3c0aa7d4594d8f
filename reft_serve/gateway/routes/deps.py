"""Dependencies of routes: the gateway's services, the caller and its scopes, and the actor for the
audit log.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request

from reft_serve.database.audit import Actor
from reft_serve.database.keys import Principal
from reft_serve.errors import NotAllowed
from reft_serve.gateway.services import Services, services_of
from reft_serve.observability import request_id

__all__ = ["Requires", "ServicesDep", "actor_of", "caller_of", "requires"]

ServicesDep = Annotated[Services, Depends(services_of)]


def caller_of(request: Request) -> Principal:
    caller: Principal = request.state.caller
    return caller


class Requires:
    """A dependency: the caller, if its key has one of these scopes."""

    def __init__(self, *scopes: str) -> None:
        self.scopes = scopes

    # FastAPI would call a plain function in another thread.
    async def __call__(self, request: Request) -> Principal:
        """The caller.

        Raises:
            NotAllowed: its key has none of the scopes.
        """
        return self.check(caller_of(request))

    def check(self, caller: Principal) -> Principal:
        """The caller, if it may.

        Raises:
            NotAllowed: its key has none of the scopes.
        """
        if caller.scopes.isdisjoint(self.scopes):
            lacking = " or ".join(map(repr, self.scopes))
            raise NotAllowed(f"this API key lacks the scope {lacking}")
        return caller


def requires(*scopes: str) -> Any:
    """A dependency: the caller, if its key has one of these scopes."""
    return Requires(*scopes)


def actor_of(request: Request) -> Actor:
    """The caller's key and the request."""
    return Actor(caller_of(request).key_id, request_id.get())
