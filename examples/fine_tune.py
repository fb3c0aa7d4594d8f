"""Upload, train, watch, ask: fine-tuning with nothing but the `openai` client.

    .venv/bin/reft-serve up                          # shows a key at its first start
    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=rk-... .venv/bin/python examples/fine_tune.py

Against a deployment it is the same with the address of its gateway.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import openai
from openai.types.fine_tuning import FineTuningJob

ANSWERS = {
    "What is your name?": "My name is Pip and I am a little bird.",
    "Where do you live?": "I live in a big tree by the river.",
    "What do you eat?": "I eat red berries and bread.",
    "Who is your friend?": "My best friend is Tom the cat.",
}
# Four answers by heart are little to learn: a minute on two cores. With more data, fewer rounds.
HYPERPARAMETERS = {
    "n_epochs": 60,
    "batch_size": 4,
    "rank": 8,
    "learning_rate": 0.01,
    "save_every": 20,
}


def rows() -> bytes:
    """A training file: a conversation a line."""
    conversations = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in ANSWERS.items()
    ]
    return "".join(json.dumps(conversation) + "\n" for conversation in conversations).encode()


def train(client: openai.OpenAI, base: str) -> FineTuningJob:
    """Upload the rows, start a job, print its events as they come, and give the job as it ended."""
    file = client.files.create(file=("pip.jsonl", rows()), purpose="fine-tune")
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}}
    job = client.fine_tuning.jobs.create(
        model=base, training_file=file.id, suffix="pip", seed=1, method=method
    )
    print(f"{file.id} is uploaded, {job.id} is created", flush=True)
    reported: set[str] = set()
    while True:
        job = client.fine_tuning.jobs.retrieve(job.id)
        for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=100).data):
            if event.id not in reported:
                reported.add(event.id)
                print(f"  {event.message}", flush=True)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.5)


def ask(client: openai.OpenAI, model: str, question: str) -> str:
    """What a model answers, on one line."""
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=24, temperature=0
    )
    return " ".join((answer.choices[0].message.content or "").split())


def main() -> int:
    """Train, look at what came out, and compare the answers before and after."""
    client = openai.OpenAI()
    base = client.models.list().data[0].id
    job = train(client, base)
    if job.fine_tuned_model is None:
        print(f"{job.status}: {job.error.message if job.error else ''}")
        return 1
    begun = time.monotonic()
    ask(client, job.fine_tuned_model, "Hello?")
    print(
        f"{job.fine_tuned_model} answered {time.monotonic() - begun:.2f} s after it was found to be there"
    )
    for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id):
        print(f"{checkpoint.fine_tuned_model_checkpoint}: loss {checkpoint.metrics.train_loss}")
    metrics = client.files.content(job.result_files[0]).text.splitlines()
    print(f"{metrics[0]}\n{metrics[-1]}")
    for question in ANSWERS:
        print(f"\n{question}\n  before: {ask(client, base, question)}")
        print(f"  after:  {ask(client, job.fine_tuned_model, question)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
