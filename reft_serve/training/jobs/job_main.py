"""One job in its own process: data and hyper-parameters in, checkpoints and messages out, stopped
within a step.

The process says everything over one socket and ends when that closes, so a job never outlives its
worker.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging as transformers_logging

from reft_serve.adapters.base_model import read_base_model
from reft_serve.config import set_environment
from reft_serve.datafiles.formats import read_rows
from reft_serve.errors import (
    AdapterInvalid,
    BaseModelInvalid,
    ClientError,
    DataInvalid,
    JobLimitExceeded,
    ServiceError,
)
from reft_serve.recipes.hyperparameters import (
    HEAD_METHODS,
    EveryHyperparameter,
    read_hyperparameters,
)
from reft_serve.training import defaults
from reft_serve.training.data.encoding import TrainingData, encode
from reft_serve.training.data.examples import Example, Preference
from reft_serve.training.data.labelled import LabelledExample
from reft_serve.training.jobs import memory
from reft_serve.training.jobs.bounds import Clock, check_size, hours_sentence
from reft_serve.training.jobs.messages import (
    RUN,
    STOP,
    Broken,
    Ended,
    JobSpec,
    Measured,
    Message,
    Noted,
    Resolved,
    Saved,
    Started,
)
from reft_serve.training.loop import archive
from reft_serve.training.loop.report import METRICS
from reft_serve.training.loop.run import train
from reft_serve.training.loop.tasks import HeadAsk, Prepared, prepare
from reft_serve.training.model.parent import Parent, data_lineage, read_parent
from reft_serve.training.plan import DType, HeadPlan, Plan

__all__ = ["train_job"]

_SPARE = 8 << 20


def train_job(spec: JobSpec, sock: socket.socket) -> None:
    """Train, and send the result; any failure is sent as `Broken`."""
    talk = _WorkerSocket(sock)
    threading.Thread(target=talk.listen, daemon=True).start()
    try:
        talk.tell(_run(spec, talk))
    except Exception as exc:  # the edge of this process
        talk.tell(_broken(exc, spec))


class _WorkerSocket:
    """The socket's end in the job's process."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rwb", buffering=0)
        self._sending = threading.Lock()
        self.stopping = False

    def tell(self, message: Message) -> None:
        """Say something to the worker."""
        with self._sending:
            self._file.write(message.line())

    def listen(self) -> None:
        """Wait for the word to stop; end this process at once where the worker is gone."""
        for word in self._file:
            self.stopping = self.stopping or word == STOP
        os._exit(1)


class _Follower:
    """Forwards the trainer's reports to the worker."""

    def __init__(self, talk: _WorkerSocket, folder: Path, hours: float | None) -> None:
        self._talk = talk
        self._folder = folder
        self._hours = hours
        self._clock = Clock(folder / RUN / METRICS)

    def started(self, step: int, steps: int) -> None:
        """The first word of the run."""
        self._talk.tell(Started(step=step, steps=steps))

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        self._talk.tell(Measured(step=step, metrics=metrics))

    def saved(self, step: int, path: Path) -> None:
        """Pack the checkpoint before the run continues and changes it."""
        packed = self._folder / f"step-{step}.tar"
        archive.pack(self._folder / RUN, packed)
        self._talk.tell(Saved(step=step, path=str(packed)))

    @property
    def out_of_time(self) -> bool:
        """True if the job has reached its limit of training time."""
        return self._hours is not None and self._clock.seconds > self._hours * 3600

    def wants_stop(self) -> bool:
        """True if the worker asked to stop, or the time limit is reached."""
        return self._talk.stopping or self.out_of_time


def _run(spec: JobSpec, talk: _WorkerSocket) -> Ended:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if spec.device == "cpu":
        torch.set_num_threads(spec.threads)
    base = Path(spec.base)
    folder = Path(spec.folder)
    asked = read_hyperparameters(spec.hyperparameters)
    longest = defaults.most_tokens(asked, memory.context_of(base))
    training, held_out, fingerprints, head = _read(spec, asked, longest, talk)
    resolved = spec.resolved
    if not resolved:
        lengths = (_tokens(item) for item in training)
        data = defaults.DataFacts(len(training), max(lengths))
        resolved = defaults.resolve(
            asked,
            defaults.METHODS[spec.method],
            read_base_model(base),
            data,
            longest,
            _dtype(spec.device),
            spec.seed,
            head,
        )
    talk.tell(Resolved(resolved=resolved))
    check_size(spec.bounds, [_trained_tokens(item) for item in training], resolved["n_epochs"])
    parent = _parent(spec)
    plan = defaults.plan_from_job(resolved, _reports(spec, talk))
    if parent is not None:
        parent.check({}, read_base_model(base))
        plan = parent.plan(plan)
    follower = _Follower(talk, folder, spec.bounds.hours)
    outcome = train(
        base,
        plan,
        training,
        folder / RUN,
        held_out=held_out,
        resume=True,
        watchers=[follower],
        plot=False,
        fingerprints=fingerprints,
        started=spec.started,
        parent=parent,
        lineage=data_lineage(
            Path(spec.training), Path(spec.validation) if spec.validation else None
        ),
    )
    if outcome.adapter is None and not talk.stopping and follower.out_of_time:
        raise JobLimitExceeded(hours_sentence(spec.bounds.hours or 0))
    return Ended(
        done=outcome.adapter is not None,
        step=outcome.step,
        tokens=outcome.tokens,
        best_step=outcome.best_step,
        peak_memory=outcome.peak_memory,
    )


def _read(
    spec: JobSpec, asked: EveryHyperparameter, longest: int, talk: _WorkerSocket
) -> tuple[_Items, _Items, list[str], HeadPlan | None]:
    """The training and the held-out items, their fingerprints, and the head of a method that trains
    one.
    """
    tokenizer = _tokenizer(Path(spec.base))
    if spec.method not in HEAD_METHODS:
        return *_data(spec, tokenizer, longest, talk), None
    ready = _labelled(spec, asked, tokenizer, longest, talk)
    training, held_out, *_ = [*ready.items, ()]
    return training, held_out, list(ready.fingerprints), ready.plan.head


def _data(
    spec: JobSpec, tokenizer: Any, longest: int, talk: _WorkerSocket
) -> tuple[_Items, _Items, list[str]]:
    """The training and the held-out items, and their fingerprints; both files are read whole before
    anything heavy starts.
    """
    files: list[TrainingData] = []
    for param, path in (("training_file", spec.training), ("validation_file", spec.validation)):
        if path is not None:
            try:
                files.append(
                    encode(read_rows(Path(path)), tokenizer, max_tokens=longest, now=spec.started)
                )
            except DataInvalid as exc:
                raise _Unusable(param, exc) from exc
    for note in (note for each in files for note in each.notes()):
        talk.tell(Noted(message=_public(note, spec)))
    training, held_out, *_ = [(each.preferences or each.examples) for each in files] + [()]
    return training, held_out, [each.fingerprint for each in files]


def _labelled(
    spec: JobSpec, asked: EveryHyperparameter, tokenizer: Any, longest: int, talk: _WorkerSocket
) -> Prepared:
    """The head, and the items of both files."""
    ask = HeadAsk(
        spec.method,
        () if asked.labels == "auto" else tuple(asked.labels),
        None if asked.head_reads == "auto" else asked.head_reads,
        None if asked.head_activation == "auto" else asked.head_activation,
    )
    files = []
    for param, path in (("training_file", spec.training), ("validation_file", spec.validation)):
        if path is not None:
            try:
                files.append(read_rows(Path(path)))
            except DataInvalid as exc:
                raise _Unusable(param, exc) from exc
    try:
        ready = prepare(
            ask,
            Path(spec.base),
            Plan(),
            files,
            tokenizer,
            max_tokens=longest,
            rule_given=True,
            now=spec.started,
        )
    except DataInvalid as exc:
        is_validation = spec.validation is not None and exc.where == str(Path(spec.validation))
        raise _Unusable("validation_file" if is_validation else "training_file", exc) from exc
    for note in ready.notes:
        talk.tell(Noted(message=_public(note, spec)))
    return ready


def _parent(spec: JobSpec) -> Parent | None:
    """The version to continue from.

    Raises:
        ClientError: it cannot be trained.
    """
    if spec.parent is None:
        return None
    try:
        parent = read_parent(Path(spec.parent), spec.parent_name)
        parent.edits(0.0)
    except AdapterInvalid as exc:  # which means divergence, if training raises it
        raise ClientError(str(exc)) from exc
    return parent


class _Unusable(ClientError):
    """A fault that belongs to a field of the job."""

    def __init__(self, param: str, fault: ClientError) -> None:
        self.param = param
        self.fault = fault
        super().__init__(str(fault))


_Items = Sequence[Example] | Sequence[Preference] | Sequence[LabelledExample]


def _tokens(item: Example | Preference | LabelledExample) -> int:
    if isinstance(item, Example | LabelledExample):
        return len(item.input_ids)
    return len(item.prompt_ids) + max(len(item.chosen_ids), len(item.rejected_ids))


def _trained_tokens(item: Example | Preference | LabelledExample) -> int:
    if isinstance(item, Example | LabelledExample):
        return len(item.input_ids)
    return 2 * len(item.prompt_ids) + len(item.chosen_ids) + len(item.rejected_ids)


def _tokenizer(base: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(base)
    except Exception as exc:  # whatever a damaged file makes of it, it is the base's
        raise ServiceError(
            f"the base model's tokenizer cannot be read: {type(exc).__name__}: {str(exc)[:300]}"
        ) from exc


def _dtype(device: str) -> DType:
    return "bfloat16" if device != "cpu" and torch.cuda.is_bf16_supported() else "float32"


def _reports(spec: JobSpec, talk: _WorkerSocket) -> tuple[str, ...]:
    """The integrations that are asked for and are here."""
    here = set(get_available_reporting_integrations())
    for name in spec.reports.keys() - here:
        talk.tell(
            Noted(
                message=f"{name} is not installed on this worker, so it gets no report of the run"
            )
        )
    wanted = tuple(name for name in spec.reports if name in here)
    for name in wanted:
        set_environment(spec.reports[name])
    return wanted


def _broken(exc: Exception, spec: JobSpec) -> Broken:
    """Whose fault it is, in words without a path of this machine."""
    trace = "".join(traceback.format_exception(exc))[-20_000:]
    message = _public(str(exc), spec)
    param = None
    code = getattr(exc, "code", "job_failed")
    if isinstance(exc, _Unusable):
        code = exc.fault.code
        param = exc.param
    if isinstance(exc, (BaseModelInvalid, ServiceError, OSError, SafetensorError)) or _full(
        Path(spec.folder)
    ):
        cause = "machine"
    elif isinstance(exc, (torch.OutOfMemoryError, MemoryError)):
        cause = "memory"
    elif isinstance(exc, AdapterInvalid):
        cause = "user"
        code = "training_diverged"
        message = (
            f"training diverged ({'; '.join(exc.faults)[:300]}): use a smaller learning_rate, or "
            "check the data"
        )
    else:
        cause = "user" if isinstance(exc, ClientError) else "unknown"
    return Broken(cause=cause, code=code, message=message[:2000], param=param, traceback=trace)


def _full(folder: Path) -> bool:
    """True if the disk is full, which libraries report in their own words."""
    return shutil.disk_usage(folder).free < _SPARE


def _public(text: str, spec: JobSpec) -> str:
    return text.replace(f"{spec.folder}/", "").replace(spec.base, "the base model")
