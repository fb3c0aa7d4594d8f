"""One tenant at fifty times its limit, beside another: benchmarks/fairness.py in small, which also
holds times together.
"""

from __future__ import annotations

import statistics

from tests.support.gateway.flood import ARMS, FIRST_SECONDS, another_process, fake, tenants, turn

LIMIT, RATE, SECONDS = 60, 15.0, 3.0


def test_a_flood_beyond_a_limit_is_turned_away_and_the_other_tenant_is_always_answered() -> None:
    with fake() as (url, admin), another_process() as flooding:
        place = tenants(url, admin, LIMIT)
        turn(place, flooding, RATE, 1.0, 2.0)
        firsts, flood = turn(place, flooding, RATE, ARMS["at 50x its limit"] * LIMIT / 60, SECONDS)
    assert len(firsts) > RATE * SECONDS / 3
    assert 0 < flood[200] <= LIMIT
    assert flood[429] > LIMIT / 2
    assert flood.keys() == {200, 429}
    # Other tests may share the machine; a queue behind the flood would be a second long and more.
    assert statistics.median(firsts) < 10 * FIRST_SECONDS
