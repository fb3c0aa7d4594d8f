"""No tenant reads, uses, counts or times what is another's, whatever all of them do."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.gateway.harness import running
from tests.support.isolation.jobs import Everything


def test_no_tenant_reads_uses_counts_or_times_anothers() -> None:
    """A short run; `scripts/bench isolation` makes a long one."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder), webhooks_to_private_addresses=True) as (gateway, (engine,)),
    ):
        Everything.gateway, Everything.engine = gateway, engine
        short = settings(
            max_examples=6, stateful_step_count=30, deadline=None, database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )  # fmt: skip
        run_state_machine_as_test(Everything, settings=short)
