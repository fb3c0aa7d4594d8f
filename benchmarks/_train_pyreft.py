"""pyreft's side of `benchmarks.train`: reads jobs, trains, answers with times. Imports nothing of ours.

Runs in an environment of its own; `tests/training/fixtures/record_pyreft.py` says how to make it.
"""

import itertools
import json
import sys
import time

import pyreft
import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

setup = json.loads(sys.stdin.readline())
torch.set_num_threads(setup["threads"])
torch.manual_seed(0)
DTYPE, DEVICE = getattr(torch, setup["dtype"]), setup.get("device", "cpu")


class Pad:
    """What a data collator asks of a tokenizer."""

    pad_token_id, padding_side, model_input_names = 0, "right", ["input_ids", "attention_mask"]

    def pad(self, features, **_):
        width = max(len(feature["input_ids"]) for feature in features)
        fill = {"input_ids": 0, "attention_mask": 0}
        padded = {
            name: torch.tensor(
                [list(f[name]) + [fill[name]] * (width - len(f[name])) for f in features]
            )
            for name in fill
        }
        return padded | {
            "intervention_locations": torch.tensor([f["intervention_locations"] for f in features])
        }


class Clock(TrainerCallback):
    """When each step ended."""

    def on_train_begin(self, *_, **__):
        self.ends = [(time.perf_counter(), time.process_time())]

    def on_step_end(self, *_, **__):
        self.ends.append((time.perf_counter(), time.process_time()))


class InOrder(pyreft.ReftTrainerForCausalLM):
    """Takes the examples as they come."""

    def get_train_dataloader(self):
        from pyreft.reft_trainer import make_dataloader

        return make_dataloader(
            self.train_dataset, self._train_batch_size, self.data_collator, shuffle=False
        )


def as_pyreft(ids, prompt_len, count):
    """As `ReftDataset` lays an example out: one pad token before it, all locations moved by one."""
    locations = pyreft.get_intervention_locations(
        last_position=prompt_len,
        positions=setup["positions"],
        num_interventions=count,
        share_weights=True,
        pad_mode="first",
    )
    return {
        "input_ids": [0, *ids],
        "attention_mask": [0] + [1] * len(ids),
        "labels": [-100] * (prompt_len + 1) + ids[prompt_len:],
        "intervention_locations": [[place + 1 for place in row] for row in locations],
    }


def build():
    base = AutoModelForCausalLM.from_pretrained(setup["base"], torch_dtype=DTYPE).to(DEVICE)
    layers, width = (
        setup.get("layers") or range(base.config.num_hidden_layers),
        base.config.hidden_size,
    )
    edits = [
        pyreft.LoreftIntervention(embed_dim=width, low_rank_dimension=setup["rank"], dtype=DTYPE)
        for _ in layers
    ]
    representations = [
        {
            "layer": k,
            "component": "block_output",
            "low_rank_dimension": setup["rank"],
            "intervention": edit,
        }
        for k, edit in zip(layers, edits, strict=True)
    ]
    model = pyreft.get_reft_model(
        base, pyreft.ReftConfig(representations=representations), set_device=False
    )
    if DEVICE != "cpu":
        model.set_device(DEVICE)
    return model, len(layers)


def train(model, layers, job):
    clock = Clock()
    arguments = TrainingArguments(
        output_dir="/tmp/pyreft-bench", per_device_train_batch_size=setup["batch"],
        gradient_accumulation_steps=setup["accumulate"], num_train_epochs=setup.get("epochs", 1),
        learning_rate=9e-4, warmup_ratio=0.1, use_cpu=DEVICE == "cpu", save_strategy="no", report_to="none",
        logging_steps=1, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    collator = pyreft.reft_trainer.make_data_collator(Pad(), None)
    data = [as_pyreft(ids, prompt_len, layers) for ids, prompt_len in job["examples"]]
    trainer = InOrder(
        model=model, args=arguments, train_dataset=data, data_collator=collator, callbacks=[clock]
    )
    trainer.train()
    return clock.ends


def main():
    model, layers = build()
    print("@@ ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        if job.get("profile"):
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU]
            ) as profile:
                train(model, layers, job)
            spent = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)[:12]
            answer = {"profile": [[e.key, e.self_cpu_time_total / 1e3, e.count] for e in spent]}
        else:
            ends = train(model, layers, job)
            wall, cpu = ([b[k] - a[k] for a, b in itertools.pairwise(ends)] for k in (0, 1))
            answer = {"seconds": wall, "cpu_seconds": cpu}
        with open("/proc/self/status") as file:
            status = dict(line.split(":", 1) for line in file)
        answer["peak_mib"] = int(status["VmHWM"].split()[0]) / 1024
        if DEVICE != "cpu":
            answer["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        print("@@", json.dumps(answer), flush=True)


main()
