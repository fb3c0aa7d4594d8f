"""One of two processes of a run, as `accelerate launch` starts them: half the batch of `test_methods`."""

import sys
from pathlib import Path

from reft_serve.training.plan import Plan
from reft_serve.training.run import train
from tests.training.test_methods import BASE, SHAPE, examples

if __name__ == "__main__":
    plan = Plan(SHAPE, epochs=3, batch=6, learning_rate=1e-2)
    train(BASE, plan, examples(24), Path(sys.argv[1]), held_out=examples(6))
