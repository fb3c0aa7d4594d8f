"""One tenant at fifty times its limit, beside another: benchmarks/fairness.py in small."""

from __future__ import annotations

import statistics

from benchmarks.fairness import ARMS, fake, tenants, turn

LIMIT, SECONDS = 60, 4.0


def test_a_flood_beyond_a_limit_is_turned_away_and_the_other_tenant_does_not_notice() -> None:
    with fake() as (url, admin):
        place = tenants(url, admin, LIMIT)
        turn(place, 10.0, 0.0, 1.0)
        alone, _ = turn(place, 15.0, 0.0, SECONDS)
        beside, flood = turn(place, 15.0, ARMS["at 50x its limit"] * LIMIT / 60, SECONDS)
    # The median: among so few streams the 99th percentile is a single one's bad luck.
    assert statistics.median(beside) < 1.2 * statistics.median(alone)
    assert 0 < flood[200] <= LIMIT
    assert flood[429] > LIMIT
    assert flood.keys() == {200, 429}
