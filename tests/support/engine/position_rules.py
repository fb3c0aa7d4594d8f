"""Position rules drawn by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from reft_serve.interventions.positions import PositionRule

RULES = st.one_of(
    st.builds(
        PositionRule,
        st.sampled_from(["f1", "l1", "f3", "l5", "f3+l3", "f7+l7", "first", "last", "0,2,-1,-3"]),
        last_offset=st.integers(0, 2),
        phase=st.sampled_from(["prompt", "all", "generated"]),
    ),
    st.builds(PositionRule, st.just("all"), phase=st.sampled_from(["prompt", "all", "generated"])),
    st.builds(PositionRule, st.sampled_from(["f1+l1", "f5+l2", "f7+l7"]), tied=st.just(False)),
)
