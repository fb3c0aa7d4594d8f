"""What the repository ships to be tried: the model, its adapters, and the demonstration."""

from __future__ import annotations

import asyncio

import pytest

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.directory import TENSORS, read_adapter
from reft_serve.adapters.manifest import EngineLimits
from reft_serve.demo.behaviours import ADAPTERS, BEHAVIOURS, MODEL, Behaviour, is_neutral
from reft_serve.demo.run import BASE, Answer, Ask, faults_of
from reft_serve.demo.server import serving
from reft_serve.errors import ServiceError

NAMES = [behaviour.name for behaviour in BEHAVIOURS]
SAMPLES = {
    "birds": (" One bird met two Birds.", " One bird, and a birdcage."),
    "cats": (" The kitten slept.", " They were category one."),
    "speech": ('\n"Look!" she said.', ' She said "look".'),
    "rain": (" It rained all day.", " The train was late."),
    "tears": (" Tom cried.", " He saddled up."),
}


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=NAMES)
def test_a_rule_accepts_what_behaves_and_nothing_else(behaviour: Behaviour) -> None:
    does, does_not = SAMPLES[behaviour.name]
    assert behaviour.holds(does)
    assert not behaviour.holds(does_not)


def test_a_prompt_that_gives_a_behaviour_away_is_not_neutral() -> None:
    assert is_neutral("Once upon a time, there was a girl.")
    assert not is_neutral("Once upon a time, there was a cat.")
    assert not is_neutral('Tom said, "Hi".')


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=NAMES)
def test_every_shipped_adapter_is_what_its_behaviour_says(behaviour: Behaviour) -> None:
    adapter = read_adapter(ADAPTERS / behaviour.name)
    manifest = adapter.manifest
    assert manifest.positions == behaviour.rule
    assert {(spec.kind, spec.rank) for spec in manifest.interventions} == {
        (behaviour.kind, behaviour.rank)
    }
    assert (
        EngineLimits(max_rank=16, max_interventions=12).faults(manifest, read_base_model(MODEL))
        == []
    )
    assert adapter.warnings == ()
    assert (ADAPTERS / behaviour.name / TENSORS).stat().st_size < 200_000


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=NAMES)
def test_every_shipped_adapter_was_seen_to_work_on_held_out_prompts(behaviour: Behaviour) -> None:
    facts = read_adapter(ADAPTERS / behaviour.name).manifest.provenance
    base_rate, rate = facts["base_rate"], facts["rate"]
    assert isinstance(base_rate, float)
    assert isinstance(rate, float)
    assert rate > 0.5 > 2 * base_rate


ASK = Ask("birds", "Tom went out.", None, stream=False)


@pytest.mark.parametrize(
    ("batch", "alone", "says"),
    [
        ([Answer(ASK, "A bird.")], [Answer(ASK, "A bird.")], None),
        ([Answer(ASK, "He ran.")], [], "birds had no effect"),
        ([Answer(ASK, "", "no such model")], [], "no such model"),
        ([Answer(ASK, "A bird.")], [Answer(ASK, "A dog.")], "differently alone"),
    ],
)
def test_the_demonstration_fails_for_every_reason_that_it_promises(
    batch: list[Answer], alone: list[Answer], says: str | None
) -> None:
    base = Answer(Ask(BASE, ASK.prompt, None, stream=True), "He ran.")
    faults = faults_of([base, *batch], alone)
    assert len(faults) == (says is not None)
    assert says is None or says in faults[0]


def test_a_server_that_cannot_start_says_why() -> None:
    async def start() -> None:
        async with serving([str(MODEL), "--adapter", "a=/nowhere"]):
            pass

    with pytest.raises(ServiceError, match=r"(?s)exit code 1.*there is no directory at /nowhere"):
        asyncio.run(start())
