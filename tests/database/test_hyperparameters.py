"""What a job may set: what is taken, and the sentence for what is not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from reft_serve.recipes.hyperparameters import (
    DpoHyperparameters,
    SupervisedHyperparameters,
    read_hyperparameters,
)

NAN = float("nan")


def test_what_is_left_out_or_auto_is_not_set() -> None:
    given = {
        "n_epochs": "auto",
        "rank": 4,
        "tied": False,
        "positions": "f1+l1",
        "lora_rank": 0,
        "layers": [1, 3],
    }
    asked = SupervisedHyperparameters.model_validate(given).asked()
    assert asked == {name: value for name, value in given.items() if value != "auto"}
    assert read_hyperparameters(asked).asked() == asked
    assert SupervisedHyperparameters().asked() == {}


@pytest.mark.parametrize(
    ("given", "field", "phrase"),
    [
        ({"rank": 0}, "rank", '"auto" or a whole number from 1 to 1,024'),
        ({"rank": "8"}, "rank", "a whole number"),
        ({"rank": True}, "rank", "a whole number"),
        ({"rank": 1 << 80}, "rank", "a whole number"),
        ({"n_epochs": 2.5}, "n_epochs", "a whole number"),
        ({"dropout": 1.0}, "dropout", "a number from 0 to below 1"),
        ({"dropout": NAN}, "dropout", "a number from 0 to below 1"),
        ({"learning_rate_multiplier": 0}, "learning_rate_multiplier", "a number above 0"),
        ({"kind": "lora"}, "kind", "one of loreft"),
        ({"layers": []}, "layers", "a list of layer numbers"),
        ({"layers": [-1]}, "layers", "a list of layer numbers"),
        ({"positions": "f0"}, "positions", "fN+lN"),
        ({"positions": "f7;l7"}, "positions", "fN+lN"),
        ({"lora_targets": ["../x"], "lora_rank": 4}, "lora_targets", "names of linear layers"),
        ({"beta": 0.1}, "beta", "Extra inputs"),
        ({"tied": False}, "", "needs positions of the form fN+lN"),
        ({"tied": False, "positions": "last"}, "", "cannot be untied"),
        ({"lora_alpha": 8.0}, "", "set lora_rank"),
        ({"learning_rate": 0.1, "learning_rate_multiplier": 2}, "", "not both"),
    ],
)
def test_what_cannot_be_gets_one_sentence_at_its_place(
    given: dict[str, Any], field: str, phrase: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        SupervisedHyperparameters.model_validate(given)
    (fault,) = caught.value.errors()
    assert phrase in fault["msg"]
    assert fault["loc"] == ((field,) if field else ())


def test_beta_belongs_to_dpo() -> None:
    assert DpoHyperparameters(beta=0.2).asked() == {"beta": 0.2}
