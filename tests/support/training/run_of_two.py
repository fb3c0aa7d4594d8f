"""One of two processes of two runs, as `torchrun` starts them: half the batch of `test_methods`."""

import sys
from dataclasses import replace
from pathlib import Path

from reft_serve.training.loop.run import train
from reft_serve.training.plan import Plan
from tests.support.training.runs import BASE, SHAPE, examples

if __name__ == "__main__":
    plan = Plan(SHAPE, epochs=3, batch=6, learning_rate=1e-2)
    out = Path(sys.argv[1])
    train(BASE, plan, examples(24), out / "measured", held_out=examples(6))
    # Without an evaluation nothing makes the processes wait for each other before they write to a
    # checkpoint.
    train(BASE, replace(plan, epochs=1, save_every=1), examples(24), out / "saving")
