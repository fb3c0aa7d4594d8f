"""The usage ledger. A request is admitted before its answer begins and settled when it ends: one
row each, once.

A gateway that dies leaves admissions behind; `recover` turns them into usage rows of status
`interrupted`.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from reft_serve.database.connection import insert_new
from reft_serve.database.models import DAY_MS, Admission, Usage, now_ms
from reft_serve.errors import RequestInvalid

__all__ = [
    "BUCKETS",
    "GROUPS",
    "ROWS",
    "Ending",
    "Opening",
    "Status",
    "Total",
    "admit",
    "probe",
    "recover",
    "settle",
    "totals",
]

Status = Literal["completed", "failed", "cancelled", "interrupted"]
BUCKETS = {"hour": 3_600_000, "day": DAY_MS}
ROWS = 10_000
GROUPS = ("tenant", "key", "model", "version", "endpoint", "status")
_COLUMNS: Mapping[str, InstrumentedAttribute[Any]] = {
    "tenant": Usage.tenant_id,
    "key": Usage.key_id,
    "model": Usage.model,
    "version": Usage.version_id,
    "endpoint": Usage.endpoint,
    "status": Usage.status,
}


@dataclass(frozen=True, slots=True)
class Opening:
    """A request as it is admitted."""

    request_id: str
    gateway: str
    tenant_id: str
    key_id: str
    endpoint: str
    model: str
    version_id: str | None
    started_ms: int


@dataclass(frozen=True, slots=True)
class Ending:
    """Usage of one request."""

    opening: Opening
    status: Status
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ended_ms: int


@dataclass(frozen=True, slots=True)
class Total:
    """Sums over the requests of one bucket (its start in ms; None: all of them) and one group."""

    start_ms: int | None
    group: dict[str, str | None]
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


def admit(connection: Connection, openings: Sequence[Opening]) -> None:
    """Record that these requests begin; one that is recorded already stays as it is."""
    _insert(connection, Admission, [asdict(opening) for opening in openings])


def settle(
    connection: Connection, endings: Sequence[Ending], admitted: Collection[str] | None = None
) -> None:
    """Record the usage of these requests; one that is already settled is left unchanged.

    Args:
        connection: in a transaction.
        endings: one for each request.
        admitted: the ids of those that may have been admitted; None: all of them.
    """
    _insert(connection, Usage, [_row(ending) for ending in endings])
    done = [ending.opening.request_id for ending in endings] if admitted is None else list(admitted)
    if done:
        connection.execute(delete(Admission).where(Admission.request_id.in_(done)))


def probe(connection: Connection, gateway: str) -> None:
    """Write what every request needs to write, and take it back in the same transaction."""
    opening = Opening(
        f"probe_{secrets.token_hex(12)}", gateway, "", "", "probe", "", None, now_ms()
    )
    admit(connection, [opening])
    connection.execute(delete(Admission).where(Admission.request_id == opening.request_id))


def recover(connection: Connection, gateway: str, older_than_ms: int) -> int:
    """Settle as `interrupted` every admission of `gateway`, which has just started, and every one
    that is older than any request can be; returns how many.
    """
    dead = (Admission.gateway == gateway) | (Admission.started_ms < older_than_ms)
    rows = connection.execute(
        delete(Admission).where(dead).returning(*Admission.__table__.columns)
    ).all()
    endings = [Ending(Opening(**row._mapping), "interrupted", 0, 0, 0, now_ms()) for row in rows]
    _insert(connection, Usage, [_row(ending) for ending in endings])
    return len(rows)


def _insert(
    connection: Connection, table: type[Admission | Usage], rows: list[dict[str, Any]]
) -> None:
    if rows:
        connection.execute(insert_new(connection.dialect, table, ["request_id"]), rows)


async def totals(
    session: AsyncSession,
    *,
    tenant_id: str | None,
    start_ms: int,
    end_ms: int,
    bucket: str | None = None,
    group_by: Sequence[str] = (),
) -> list[Total]:
    """Sums of requests that began in [start, end), by bucket and group, in that order.

    Args:
        session: any.
        tenant_id: whose; None for everybody's.
        start_ms: first moment.
        end_ms: the moment after the last.
        bucket: "hour" or "day" (UTC); None for one sum.
        group_by: some of GROUPS.

    Raises:
        RequestInvalid: there are more than ROWS of them.
    """
    keys: list[Any] = [_COLUMNS[name] for name in group_by]
    if bucket is not None:
        width = BUCKETS[bucket]
        keys.insert(0, (Usage.started_ms - Usage.started_ms % width).label("start"))
    counted = (Usage.prompt_tokens, Usage.cached_tokens, Usage.completion_tokens)
    query = select(*keys, func.count(), *(func.coalesce(func.sum(column), 0) for column in counted))
    query = query.where(Usage.started_ms >= start_ms, Usage.started_ms < end_ms)
    if tenant_id is not None:
        query = query.where(Usage.tenant_id == tenant_id)
    if keys:
        query = query.group_by(*keys).order_by(*keys)
    rows = (await session.execute(query.limit(ROWS + 1))).all()
    if len(rows) > ROWS:
        raise RequestInvalid(
            f"the result has more than {ROWS} rows: choose a shorter period, larger buckets or "
            "fewer groups"
        )
    return [_total(tuple(row), bucket is not None, group_by) for row in rows]


def _total(row: tuple[Any, ...], bucketed: bool, group_by: Sequence[str]) -> Total:
    start = row[0] if bucketed else None
    group = dict(zip(group_by, row[bucketed : bucketed + len(group_by)], strict=True))
    return Total(start, group, *(int(number) for number in row[bucketed + len(group_by) :]))


def _row(ending: Ending) -> dict[str, Any]:
    opening = asdict(ending.opening)
    del opening["gateway"]
    return opening | {
        "status": ending.status,
        "prompt_tokens": ending.prompt_tokens,
        "cached_tokens": ending.cached_tokens,
        "completion_tokens": ending.completion_tokens,
        "duration_ms": max(0, ending.ended_ms - ending.opening.started_ms),
    }
