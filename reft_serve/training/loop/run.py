"""A whole run: a base model, a plan and examples become a published adapter and a record of how it
was made.

::

    OUT/adapter/         the finished version: the best on held-out data if there is any, else
                         the last
    OUT/checkpoints/     checkpoint-N, each a version that can be served and resumed from
    OUT/metrics.jsonl    numbers of every step      OUT/loss.png  OUT/summary.json
    OUT/run.json         what was asked for, so that resuming with something else is refused
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch

from reft_serve.adapters.base_model import read_base_model
from reft_serve.adapters.directory import read_adapter
from reft_serve.adapters.manifest import BaseFacts
from reft_serve.errors import AdapterExists, ClientError
from reft_serve.training.data.batching import collate
from reft_serve.training.data.examples import Example, Preference
from reft_serve.training.data.labelled import LabelledExample
from reft_serve.training.loop import checkpoints, report
from reft_serve.training.loop.classification import Labels, Reward
from reft_serve.training.loop.dpo import Dpo
from reft_serve.training.loop.objectives import Objective, Supervised
from reft_serve.training.loop.trainer import ReftTrainer, Watcher, arguments
from reft_serve.training.model.adapter import build, publish_version
from reft_serve.training.model.classifier import ClassifierModel
from reft_serve.training.model.edited_model import EditedModel
from reft_serve.training.model.parent import Parent
from reft_serve.training.model.processes import this_process
from reft_serve.training.plan import LoraPlan, Method, Plan

__all__ = ["Outcome", "fresh_because", "started_at", "train"]

_RUN = "run.json"
_SUMMARY = "summary.json"
Items = Sequence[Example] | Sequence[Preference] | Sequence[LabelledExample]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a run. `share`: trained parameters per parameter of the base. Sizes in bytes.

    A run that a watcher stopped has no adapter yet: resume it.
    """

    adapter: str | None
    digest: str | None
    step: int
    steps: int
    best_step: int | None
    best_loss: float | None
    tokens: int
    parameters: int
    share: float
    size: int
    seconds: float
    peak_memory: int


def train(
    base: Path,
    plan: Plan,
    items: Items,
    out: Path,
    *,
    held_out: Items = (),
    resume: bool = False,
    watchers: Sequence[Watcher] = (),
    plot: bool = True,
    fingerprints: Sequence[str] = (),
    started: datetime | None = None,
    parent: Parent | None = None,
    lineage: Mapping[str, str | int] = MappingProxyType({}),
) -> Outcome:
    """Train an adapter for the model at `base` and publish it under `out`.

    Args:
        items: examples, or preferences where the plan's method is dpo. held_out: of the same sort.
        resume: resume from the newest checkpoint under `out`, if there is one; the rest must be as
            it was.
        watchers: notified of every step, next to the record that is kept in `out`.
        plot: draw the losses at the end.
        fingerprints: of the data that `items` and `held_out` were made of; a run whose data have
            the same can be resumed, also if a chat template has rendered them in another way.
        started: the time that chat templates were given, kept for `started_at`.
        parent: the version to continue from; `plan` has its structure already (`Parent.plan`).
        lineage: what else the versions record of where they come from, such as digests of data
            files.

    Raises:
        ClientError: the plan or the data cannot be used. AdapterExists: `out` holds a run and
            `resume` is not set.
        BaseModelInvalid: the base is none that can be edited. AdapterInvalid: training diverged.
    """
    plan.check()
    objective = _objective(plan, [*items, *held_out])
    clock = time.monotonic()
    facts = read_base_model(base)
    process = this_process()
    begins = None
    if parent is not None:
        lineage = {**parent.lineage(), **lineage}
        if fresh_because(parent, plan, items, fingerprints) is None:
            begins, plan = parent.path, parent.extended(plan)
    with process.main_process_first():
        if process.is_main_process:
            asked = _asked(facts, plan, items, held_out) | {"fingerprints": list(fingerprints)}
            if parent is not None:
                asked |= {"parent": parent.adapter.digest}
            _claim(out, asked, resume, started or datetime.now())
    model = build(base, plan, parent)
    trainer = _trainer(model, plan, facts, objective, items, held_out, out, watchers, lineage)
    last = checkpoints.newest(out / "checkpoints") or begins
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    process.wait_for_everyone()
    if process.is_main_process:
        if plot:
            report.plot_losses(out)
        _finish(out, trainer)
    process.wait_for_everyone()
    return _outcome(out, model, trainer, time.monotonic() - clock)


def fresh_because(
    parent: Parent, plan: Plan, items: Items, fingerprints: Sequence[str] = ()
) -> str | None:
    """Why a run that continues from `parent` starts with a new optimiser; None if it takes over the
    optimiser's state.
    """
    return parent.fresh_because(plan, _recorded(plan), [*fingerprints[:1], _digest(items)])


def _trainer(
    model: EditedModel | ClassifierModel,
    plan: Plan,
    facts: BaseFacts,
    objective: Objective[Any],
    items: Items,
    held_out: Items,
    out: Path,
    watchers: Sequence[Watcher],
    lineage: Mapping[str, str | int],
) -> ReftTrainer[Any]:
    packed = model.can_pack(max(objective.tokens(item) for item in (*items, *held_out)))
    if isinstance(objective, Dpo) and isinstance(model, EditedModel):
        lay_out = partial(collate, rule=plan.adapter.rule, packed=packed)
        objective.consult(
            model, cast(Sequence[Preference], [*items, *held_out]), lay_out, plan.batch
        )
    provenance = (
        plan.facts() | {"examples": len(items), "held_out_examples": len(held_out)} | dict(lineage)
    )
    settings = arguments(plan, out / "checkpoints", evaluates=bool(held_out))

    def publish(path: Path) -> None:
        publish_version(path, model, plan, facts, provenance | {"step": trainer.state.global_step})

    followers = (report.Record(out), *watchers)
    trainer: ReftTrainer[Any] = ReftTrainer(
        model,
        plan,
        settings,
        objective,
        items,
        held_out,
        publish,
        packed=packed,
        watchers=followers,
    )
    return trainer


_ITEMS: dict[Method, tuple[type, str]] = {
    "supervised": (Example, "examples"),
    "dpo": (Preference, "preferences"),
    "reward": (Preference, "preferences"),
    "labels": (LabelledExample, "labelled texts"),
}


def _objective(
    plan: Plan, items: Sequence[Example | Preference | LabelledExample]
) -> Objective[Any]:
    wanted, sort = _ITEMS[plan.method]
    if not items or not all(isinstance(item, wanted) for item in items):
        raise ClientError(
            f"method {plan.method} learns from {sort}, but the data holds none or other rows too"
        )
    if plan.head is not None:
        return cast(Objective[Any], Labels(plan.head) if plan.method == "labels" else Reward())
    return Dpo(plan.dpo_beta) if plan.method == "dpo" else Supervised()


def _asked(facts: BaseFacts, plan: Plan, items: Items, held_out: Items) -> dict[str, Any]:
    """Facts that must be equal for a run to be resumed."""
    digests = [_digest(data) for data in (items, held_out)]
    return {
        "base": facts.model_dump(),
        "plan": _recorded(plan),
        "data": digests[0],
        "held_out": digests[1],
    }


def _digest(items: Items) -> str:
    return hashlib.sha256(repr(list(items)).encode()).hexdigest()


def _recorded(plan: Plan) -> dict[str, Any]:
    # who is told changes nothing
    record: dict[str, Any] = json.loads(json.dumps(asdict(replace(plan, report_to=()))))
    return record


def _filled(recorded: Any, defaults: Any) -> Any:
    """Facts recorded by an earlier version, completed with the defaults of that version."""
    if not (isinstance(recorded, dict) and isinstance(defaults, dict)):
        return recorded
    return defaults | {name: _filled(value, defaults.get(name)) for name, value in recorded.items()}


def started_at(out: Path) -> datetime | None:
    """When the run in `out` was started, for chat templates that write the date; None if `out`
    holds none.

    The time has no time zone: it is what the clock on the wall said. A record of an earlier release
    has its file's time.
    """
    record = out / _RUN
    if not record.exists():
        return None
    recorded = json.loads(record.read_text()).get("started")
    return (
        datetime.fromisoformat(recorded)
        if recorded
        else datetime.fromtimestamp(record.stat().st_mtime)
    )


def _differing(asked: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """Names of the facts that differ from the recorded run. Tokens may differ if rows and template
    are the same.
    """
    wrong = [name for name in ("base", "plan", "parent") if asked.get(name) != recorded.get(name)]
    before = recorded.get("fingerprints") or ()
    now = asked["fingerprints"]
    for i, name in enumerate(("data", "held_out")):
        same_source = i < len(now) and i < len(before) and now[i] == before[i]
        if asked[name] != recorded.get(name) and not same_source:
            wrong.append(name)
    return wrong


def _claim(out: Path, asked: dict[str, Any], resume: bool, started: datetime) -> None:
    """Make `out` this run's folder, or find it to be."""
    record = out / _RUN
    if record.exists() and resume:
        recorded = json.loads(record.read_text())
        recorded["plan"] = _filled(recorded.get("plan"), _recorded(Plan(lora=LoraPlan())))
        wrong = _differing(asked, recorded)
        if wrong:
            raise ClientError(
                f"{out} holds another run: its {' and '.join(wrong)} differ, so it cannot be "
                "resumed"
            )
        checkpoints.sweep(out / "checkpoints")
    elif out.exists() and any(out.iterdir()):
        raise AdapterExists(
            f"{out} is not empty: choose another --out, or --resume the run that is in it"
        )
    else:
        out.mkdir(parents=True, exist_ok=True)
        aside = record.with_suffix(".new")
        aside.write_text(json.dumps(asked | {"started": started.isoformat()}, indent=2) + "\n")
        os.replace(aside, record)


def _finish(out: Path, trainer: ReftTrainer[Any]) -> None:
    """Publish the best checkpoint, or the last, unless the run was stopped on its way."""
    if trainer.state.global_step < trainer.state.max_steps or (out / "adapter").exists():
        return
    whole = checkpoints.sealed(out / "checkpoints")
    chosen = (
        whole.get(trainer.state.best_global_step or trainer.state.global_step)
        or list(whole.values())[-1]
    )
    aside = out / ".adapter"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name in checkpoints.SERVED:
        if (chosen / name).exists():
            shutil.copyfile(chosen / name, aside / name)
    checkpoints.sync(aside)
    os.rename(aside, out / "adapter")


def _outcome(
    out: Path, model: EditedModel | ClassifierModel, trainer: ReftTrainer[Any], seconds: float
) -> Outcome:
    path = out / "adapter"
    adapter = read_adapter(path) if path.exists() else None
    learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = trainer.state
    total = sum(p.numel() for p in model.lm.parameters() if not p.requires_grad)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcome = Outcome(
        adapter=None if adapter is None else str(path),
        digest=None if adapter is None else adapter.digest,
        step=state.global_step,
        steps=state.max_steps,
        best_step=state.best_global_step,
        best_loss=state.best_metric,
        tokens=state.num_input_tokens_seen,
        parameters=learnt,
        share=learnt / total,
        size=0 if adapter is None else sum(file.stat().st_size for file in path.iterdir()),
        seconds=round(seconds, 3),
        peak_memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak,
    )
    if trainer.is_world_process_zero():
        (out / _SUMMARY).write_text(json.dumps(asdict(outcome), indent=2) + "\n")
    return outcome
