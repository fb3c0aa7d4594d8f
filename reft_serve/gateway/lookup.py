"""Keys and model names, looked up in the database and remembered for a moment."""

from __future__ import annotations

import random
import time
from typing import TypeVar

from reft_serve.database.connection import Database
from reft_serve.database.keys import Principal, authenticate, digest_of_secret
from reft_serve.database.models import now_ms
from reft_serve.database.resolution import Route, Target, resolve
from reft_serve.errors import ModelNotFound

__all__ = ["LookupCache"]

_REMEMBERED = 50_000
_K = TypeVar("_K")
_V = TypeVar("_V")


class LookupCache:
    """Cache of database look-ups: the principal of a key, and the target of a model name."""

    def __init__(self, database: Database, base_model: str, seconds: float) -> None:
        self._database = database
        self._base_model = base_model
        self._seconds = seconds
        self._keys: dict[str, tuple[float, Principal | None]] = {}
        self._routes: dict[tuple[str, str], tuple[float, Route | None]] = {}
        self._random = random.Random()  # noqa: S311 - it only shares traffic out

    def forget(self) -> None:
        """Ask again: something was changed here."""
        self._keys.clear()
        self._routes.clear()

    async def principal(self, secret: str) -> Principal | None:
        """Principal of a key; None if there is none."""
        digest = digest_of_secret(secret)
        now = time.monotonic()
        remembered = self._keys.get(digest)
        if remembered is None or remembered[0] < now:
            authenticated = await self._database.read(lambda session: authenticate(session, digest))
            remembered = _remember(self._keys, digest, (now + self._seconds, authenticated))
        principal = remembered[1]
        if (
            principal is not None
            and principal.expires_ms is not None
            and principal.expires_ms <= now_ms()
        ):
            return None
        return principal

    async def target(self, caller: Principal, model: str) -> Target | None:
        """The version that answers this request; None for the base model.

        Raises:
            ModelNotFound: the caller has no such model.
        """
        if model == self._base_model:
            return None
        key = (caller.tenant_id, model)
        now = time.monotonic()
        # PostgreSQL has no such text
        remembered = (now, None) if "\0" in model else self._routes.get(key)
        if remembered is None or remembered[0] < now:
            target = await self._database.read(
                lambda session: resolve(session, caller.tenant_id, model)
            )
            remembered = _remember(self._routes, key, (now + self._seconds, target))
        route = remembered[1]
        if route is None:
            raise ModelNotFound.named(model)
        return route.draw(self._random.random())


def _remember(cache: dict[_K, _V], key: _K, value: _V) -> _V:
    if len(cache) >= _REMEMBERED:
        cache.clear()
    cache[key] = value
    return value
