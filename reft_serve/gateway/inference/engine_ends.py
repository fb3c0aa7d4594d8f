"""Handling of requests whose engine crashed: retried once, or failed and quarantined."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from reft_serve.database import audit
from reft_serve.database.audit import Actor
from reft_serve.database.usage import Opening
from reft_serve.errors import EngineEnded
from reft_serve.gateway.engines.engine import Engine
from reft_serve.gateway.engines.quarantine import digest_of, is_plain
from reft_serve.gateway.services import Services

__all__ = ["ended_with", "note_end"]

_log = logging.getLogger(__name__)
_ENDED = (
    "an engine crashed while processing this request, and the request may be the cause: it was "
    "not retried on another engine. Do not send it again unchanged"
)


def note_end(
    services: Services,
    opening: Opening,
    path: str,
    body: Mapping[str, Any],
    engine: Engine,
    size: int,
) -> None:
    """Note that `engine` ended before it began to answer a request; it returns if the request may
    be delivered once more.

    Args:
        services: the gateway's parts.
        opening: the request.
        path: the endpoint's.
        body: the caller's.
        engine: which has ended.
        size: bytes of the body as the engine gets it.

    Raises:
        EngineEnded: the request must not reach another engine.
    """
    if _note(services, opening, path, body, engine.company()) or not is_plain(body, size):
        raise EngineEnded(_ENDED)


async def ended_with(
    services: Services,
    opening: Opening,
    path: str,
    body: Mapping[str, Any],
    engine: Engine,
    company: int,
) -> bool:
    """True if an engine that failed a request is no longer healthy; records it in that case.

    Args:
        services: the gateway's parts.
        opening: the request.
        path: the endpoint's.
        body: the caller's.
        engine: which has failed.
        company: how many requests it held then, this one included.
    """
    await engine.probe()
    if not engine.healthy:
        _note(services, opening, path, body, company)
    return not engine.healthy


def _note(
    services: Services, opening: Opening, path: str, body: Mapping[str, Any], company: int
) -> bool:
    digest = digest_of(opening.tenant_id, path, body)
    quarantined = services.quarantine.note(opening.tenant_id, digest, alone=company <= 1)
    details = {
        "digest": digest,
        "tenant": opening.tenant_id,
        "requests": company,
        "quarantined": quarantined,
    }
    _log.warning("an engine crashed while processing a request", extra={"data": details})
    if quarantined:
        services.background.spawn(_record(services, opening, digest))
    return quarantined


async def _record(services: Services, opening: Opening, digest: str) -> None:
    async with services.database.writing() as session:
        actor = Actor(opening.key_id, opening.request_id)
        details = {"endpoint": opening.endpoint, "model": opening.model[:200]}
        audit.record(session, actor, "request.quarantine", digest, opening.tenant_id, **details)
