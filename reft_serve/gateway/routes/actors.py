"""Who asks for a change, for the audit log."""

from __future__ import annotations

from fastapi import Request

from reft_serve.database.audit import Actor
from reft_serve.gateway.edge import caller_of
from reft_serve.observability import request_id

__all__ = ["actor_of"]


def actor_of(request: Request) -> Actor:
    """The caller's key and the request."""
    return Actor(caller_of(request).key_id, request_id.get())
