"""Named failures travel between processes as they are."""

from __future__ import annotations

import pickle

import pytest

from reft_serve.errors import AdapterInvalid, AdapterUnsupported, DataInvalid


@pytest.mark.parametrize("kind", [AdapterInvalid, AdapterUnsupported, DataInvalid])
def test_a_failure_with_faults_survives_a_pickle(kind: type[AdapterInvalid | DataInvalid]) -> None:
    error = kind("here", ["one", "two"])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.where, again.faults) == (str(error), "here", ("one", "two"))
