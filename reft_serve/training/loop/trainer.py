"""The loop: transformers' Trainer with our batches, loss, checkpoints and evaluation.

AdamW, schedule, accumulation, clipping, loss scaling, reports and several processes under
`accelerate launch` are the Trainer's own. There is no weight decay: pyreft's never reaches an
intervention, and decay means nothing to a rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from reft_serve.errors import ClientError
from reft_serve.training.data.batching import Batch, StepSampler, collate, micro_batches
from reft_serve.training.data.examples import Example
from reft_serve.training.loop import checkpoints
from reft_serve.training.loop.objectives import Objective
from reft_serve.training.model.classifier import ClassifierModel
from reft_serve.training.model.edited_model import EditedModel
from reft_serve.training.model.parameters import load_parameters, save_parameters
from reft_serve.training.model.state_cache import StateCache, worth_keeping
from reft_serve.training.plan import Plan

__all__ = ["ReftTrainer", "Watcher", "arguments"]

Item = TypeVar("Item")


class Watcher(Protocol):
    """Observer of a run: a progress bar, a file of metrics, a job's heartbeat. Called in the main
    process only.
    """

    def started(self, step: int, steps: int) -> None:
        """The run begins after `step` of `steps` optimiser steps."""
        ...

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        """Numbers of a step (loss, token_accuracy, learning_rate, grad_norm, epoch, tokens), or of
        an evaluation (eval_loss ...).
        """
        ...

    def saved(self, step: int, path: Path) -> None:
        """A whole checkpoint lies at `path`."""
        ...

    def wants_stop(self) -> bool:
        """Asked after each step: whether to save a checkpoint and stop."""
        ...


def arguments(plan: Plan, folder: Path, *, evaluates: bool) -> TrainingArguments:
    """The settings of transformers for a plan; checkpoints go to `folder`.

    Raises:
        ClientError: a reporting integration is not known or not installed.
    """
    ready = get_available_reporting_integrations()
    missing = [name for name in plan.report_to if name not in ready]
    if missing:
        raise ClientError(
            f"report_to {missing[0]!r} is not installed; {', '.join(ready) or 'no integration'} is"
        )
    interval: dict[str, Any] = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch" if evaluates else "no",
    }
    if plan.save_every is not None:
        steps = "steps" if evaluates else "no"
        interval = {"save_strategy": "steps", "save_steps": plan.save_every, "eval_strategy": steps}
        interval |= {"eval_steps": plan.save_every}
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=plan.batch,
        gradient_accumulation_steps=plan.accumulate,
        num_train_epochs=plan.epochs,
        max_steps=plan.max_steps or -1,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="constant_with_warmup" if plan.schedule == "constant" else plan.schedule,
        warmup_steps=plan.warmup,
        max_grad_norm=plan.clip,
        weight_decay=0.0,
        optim="adamw_torch",
        fp16=plan.dtype == "float16",
        use_cpu=not torch.accelerator.is_available(),
        seed=plan.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        report_to=list(plan.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **interval,
    )


class ReftTrainer(Trainer, Generic[Item]):  # type: ignore[misc]
    """Train an `EditedModel`.

    Args:
        packed: whether examples lie end to end (`EditedModel.can_pack`).
        publish: writes the adapter, as it is now, to a directory.
    """

    def __init__(
        self,
        model: EditedModel | ClassifierModel,
        plan: Plan,
        settings: TrainingArguments,
        objective: Objective[Item],
        items: Sequence[Item],
        held_out: Sequence[Item],
        publish: Callable[[Path], None],
        *,
        packed: bool,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self._plan = plan
        self._objective = objective
        self._publish = publish
        self._watchers = watchers
        self._collate = partial(
            _lay_out, objective, partial(collate, rule=plan.adapter.rule, packed=packed)
        )
        self._lengths = [objective.tokens(item) for item in items]
        self._sampler: StepSampler | None = None
        # Tokens of the step that were the likeliest, and all.
        self._hits = torch.zeros(2, dtype=torch.long)
        super().__init__(
            model,
            settings,
            data_collator=self._collate,
            train_dataset=items,
            eval_dataset=held_out or None,
        )
        tokens = sum(self._lengths) + sum(map(objective.tokens, held_out))
        kept = worth_keeping(model, plan, len(items), tokens, self.accelerator.num_processes)
        self._states = StateCache(model) if kept and isinstance(model, EditedModel) else None
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)
        self.add_callback(_Epochs(self))
        if self.is_world_process_zero():
            self.add_callback(_Watch(watchers))

    def get_train_dataloader(self) -> Any:
        """Batches of `StepSampler`, shared out over the processes by accelerate."""
        plan = self._plan
        world = self.accelerator.num_processes
        sampler = StepSampler(
            self._lengths,
            plan.batch,
            plan.accumulate,
            plan.seed,
            shuffle=plan.shuffle,
            processes=world,
        )
        self._sampler = sampler
        loader: Any = DataLoader(
            self.train_dataset, batch_sampler=sampler, collate_fn=self._collate
        )
        return self.accelerator.prepare(loader)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The objective's loss of a micro-batch, for gradients that accelerate will average over
        the processes.
        """
        batch = self._with_states(inputs["batch"])
        assert num_items_in_batch is not None
        processes: int = self.accelerator.num_processes
        tokens = torch.tensor(sum(batch.lengths), device=self.args.device)
        self.state.num_input_tokens_seen += int(
            self.accelerator.reduce(tokens) if processes > 1 else tokens
        )
        loss = self._objective.loss(model(batch), batch, num_items_in_batch)
        if batch.reference is None:
            hits = torch.stack([self.model.hits, self.model.hits.new_tensor(len(batch.target_ids))])
            self._hits = self._hits.to(hits.device) + (
                self.accelerator.reduce(hits) if processes > 1 else hits
            )
        return loss * processes

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the held-out items: `eval_loss` and the objective's other metrics."""
        model: Any = self.model
        model.eval()
        metrics = self._objective.metrics(self._held_out_sums(model))
        named = {f"eval_{name}": value for name, value in metrics.items()}
        self.log(dict(named))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def _held_out_sums(self, model: Any) -> Tensor:
        items: Sequence[Item] = self.eval_dataset
        lengths = [self._objective.tokens(item) for item in items]
        world = self.accelerator.num_processes
        rank = self.accelerator.process_index
        parts = micro_batches(range(len(items)), lengths, self._plan.batch, world)
        total = torch.zeros(self._objective.width, dtype=torch.float64, device=self.args.device)
        for part in islice(parts, rank, None, world):
            batch = self._with_states(
                self._collate([items[i] for i in part])["batch"].to(self.args.device)
            )
            total += self._objective.sums(model, batch)
        summed: Tensor = self.accelerator.reduce(total, "sum")
        return summed

    def _with_states(self, batch: Batch) -> Batch:
        return batch if self._states is None else self._states.join(batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Notify the callbacks; nothing is kept, since a checkpoint would hold it all."""
        hits, tokens = self._hits.tolist()
        if "loss" in logs and tokens:
            logs = logs | {"token_accuracy": hits / tokens}
            self._hits = torch.zeros_like(self._hits)
        super().log(logs, start_time)
        self.state.log_history.clear()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A version that can be served, and the parameters behind it."""
        assert output_dir is not None
        if self.args.should_save:
            self._publish(Path(output_dir))
            save_parameters(Path(output_dir), self.model)
        # The other processes make the directory for their random states, and publishing wants a
        # name that is free.
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if path in checkpoints.sealed(path.parent).values():
            return
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.seal(path)
            if self._plan.keep is not None:
                checkpoints.rotate(path.parent, self._plan.keep, self.state.best_global_step)
            for watcher in self._watchers:
                watcher.saved(self.state.global_step, path)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_parameters(Path(resume_from_checkpoint), model or self.model)

    def begin_epoch(self, steps_done: int) -> None:
        """Give the sampler the epoch that `steps_done` optimiser steps lead to."""
        assert self._sampler is not None
        per_step = self._plan.accumulate * self.accelerator.num_processes
        self._sampler.epoch = steps_done // -(-len(self._sampler) // per_step)


class _Epochs(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: ReftTrainer[Any]) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.begin_epoch(state.global_step)


class _Watch(TrainerCallback):  # type: ignore[misc]
    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = watchers

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for watcher in self._watchers:
            watcher.started(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "train_runtime" in logs:
            return
        for watcher in self._watchers:
            watcher.logged(state.global_step, {**logs, "tokens": state.num_input_tokens_seen})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if any(watcher.wants_stop() for watcher in self._watchers):
            control.should_save = control.should_training_stop = True


def _lay_out(
    objective: Objective[Item], lay: Callable[[Sequence[Example]], Batch], items: Sequence[Item]
) -> dict[str, Any]:
    batch = objective.batch(items, lay)
    # The Trainer counts labels, over all micro-batches and processes of a step.
    return {"batch": batch, "labels": torch.zeros(objective.count(batch))}
