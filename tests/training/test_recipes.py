"""Recipes and scoring: the paper's settings, its prompts, and its way of judging an answer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_serve.datafiles.formats import Completion, Glue, Instruction
from reft_serve.errors import ClientError
from reft_serve.evaluation.scoring import Verdict, judge, score, wilson
from reft_serve.recipes.recipe import Task, load_recipe, recipe_names

# pyreft, examples/loreft/README.md: the options of each command.
PAPER: dict[str, dict[str, Any]] = {
    "commonsense": {"layers": "all", "rank": 8, "positions": "f7+l7", "tied": True, "dropout": 0.0, "epochs": 6,
                    "step": 32, "learning_rate": 9e-4, "warmup_ratio": 0.1, "max_tokens": 512, "new": 32},
    "math": {"layers": "all", "rank": 8, "positions": "f7+l7", "tied": True, "dropout": 0.0, "epochs": 12,
             "step": 32, "learning_rate": 9e-4, "warmup_ratio": 0.1, "max_tokens": 512, "new": 512},
    "instruct": {"layers": (3, 9, 18, 24), "rank": 4, "positions": "f5+l5", "tied": False, "dropout": 0.0, "epochs": 9,
                 "step": 128, "learning_rate": 9e-4, "warmup_ratio": 0.0, "max_tokens": 768, "new": 1024},
    "glue-cola": {"layers": "all", "rank": 1, "positions": "l1", "tied": True, "dropout": 0.05, "epochs": 3,
                  "step": 32, "learning_rate": 6e-4, "warmup_ratio": 0.09, "max_tokens": 256, "new": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_a_named_recipe_has_the_papers_settings(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.task is not None
    adapter, run = recipe.adapter, recipe.training
    assert PAPER[name] == {
        "layers": adapter.layers, "rank": adapter.rank, "positions": adapter.positions, "tied": adapter.tied,
        "dropout": adapter.dropout, "epochs": run.epochs, "step": run.batch_size * run.accumulation,
        "learning_rate": run.learning_rate, "warmup_ratio": run.warmup_ratio, "max_tokens": run.max_tokens,
        "new": recipe.task.max_new_tokens,
    }  # fmt: skip
    assert (adapter.kind, adapter.component, adapter.activation) == (
        "loreft",
        "block_output",
        "linear",
    )
    assert (run.schedule, run.weight_decay, run.max_grad_norm) == ("linear", 0.0, 1.0)


def test_every_recipe_that_is_listed_loads_with_a_task_and_a_source() -> None:
    assert set(PAPER) < set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.task
        assert recipe.source
        assert recipe.adapter.rule


@pytest.mark.parametrize(
    "name", ["commonsence", "glue", "glue-cats", "math-x", "", "instruct.", "-"]
)
def test_an_unknown_recipe_is_told_what_there_is(name: str) -> None:
    with pytest.raises(
        ClientError,
        match=r"there is no recipe .*commonsense, glue-cola.*, or a path ending in \.toml",
    ):
        load_recipe(name)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[adapter]\nrank = 0\n", "adapter.rank: Input should be greater than or equal to 1"),
        ("[adapter]\nrang = 4\n", "adapter.rang: Extra inputs are not permitted"),
        (
            "[adapter]\npositions = 'x7'\n",
            "adapter: Value error, positions 'x7' are not understood",
        ),
        (
            "[adapter]\npositions = 'l1'\ntied = false\n",
            "adapter: Value error, positions 'l1' cannot be untied",
        ),
        ("[adapter]\nlayers = []\n", "adapter.layers"),
        ("[adapter]\nactivation = 'bark'\n", "activation 'bark' is not one of linear, relu"),
        (
            "[training]\nlearning_rate = nan\n",
            "training.learning_rate: Input should be a finite number",
        ),
        ("[training]\nepochs = 0\nbatch_size = 0\n", "training.epochs.*training.batch_size"),
        ("[task]\nprompt = '{instruction'\nanswer = 'a'\n", "expected '}'"),
        ("[task]\nprompt = '{headline}'\nanswer = 'a'\n", "names 'headline', which no row has"),
        (
            "[task]\nprompt = '{instruction.__class__}'\nanswer = 'a'\n",
            "is not the plain name of a field",
        ),
        ("[task]\nprompt = '{}'\nanswer = 'a'\n", "is not the plain name of a field"),
        ("[adapter\n", "is not TOML"),
    ],
)
def test_a_faulty_recipe_is_told_what_is_wrong(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ClientError, match=sentence):
        load_recipe(str(path))


def test_a_recipe_of_ones_own_needs_to_say_only_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[adapter]\nrank = 2\nlayers = [0, 3]\n[training]\nepochs = 1\n")
    recipe = load_recipe(str(path))
    assert (recipe.adapter.rank, recipe.adapter.layers, recipe.training.epochs, recipe.task) == (
        2,
        (0, 3),
        1,
        None,
    )


def task(name: str) -> Task:
    found = load_recipe(name).task
    assert found
    return found


def test_prompts_and_answers_are_the_papers() -> None:
    row = Instruction(
        instruction="Which barks?",
        input="",
        output="\nA: A dog barks. The answer is 4.",
        answer="4.0",
    )
    assert task("commonsense").question(row) == "Which barks?\n"
    assert task("commonsense").reply(row) == "the correct answer is 4.0"
    alpaca = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhich barks?\n\n### Response:\n"
    )
    assert task("math").question(row) == alpaca
    assert task("math").reply(row) == row.output
    assert task("math").reference(row) == "4.0"
    assert task("instruct").question(row) == alpaca
    with_input = task("instruct").question(row.model_copy(update={"input": "A cat or a dog."}))
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nWhich barks?\n\n### Input:\nA cat or a dog.\n\n"
        "### Response:\n"
    )


def test_glues_classes_have_words_and_scores_have_one_decimal() -> None:
    assert task("glue-cola").reply(Glue(label=1, sentence="A dog barks.")) == "acceptable"
    assert task("glue-mnli").reply(Glue(label=2, premise="a", hypothesis="b")) == "contradiction"
    assert task("glue-stsb").reply(Glue(label=3.25, sentence1="a", sentence2="b")) in ("3.2", "3.3")
    with pytest.raises(ValueError, match=r"label is 0\.5, but the recipe has the classes 0 to 1"):
        task("glue-cola").reply(Glue(label=0.5, sentence="A dog barks."))


def test_a_completion_is_its_own_prompt_and_answer() -> None:
    row = Completion(prompt="A dog says", completion=" woof")
    assert (task("math").question(row), task("math").reply(row), task("math").reference(row)) == (
        "A dog says", " woof", " woof",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "completion", "reference", "extracted", "correct"),
    [
        ("commonsense", "the correct answer is answer2", "answer2", "answer2", True),
        ("commonsense", "the correct answer is  answer2\n", "answer2", "answer2", True),
        ("commonsense", "the correct answer is answer2.", "answer2", "answer2.", False),
        ("commonsense", "answer2", "answer2", "", False),
        ("math", "\nA: 3 + 1 = 4. The answer is 4.", "4.0", "4.", True),
        ("math", "It costs 1,234.50 dollars", "1234.5", "1234.50", True),
        ("math", "minus -3", "-3", "-3", True),
        ("math", "4 dogs and 5 cats", "4", "5", False),
        ("math", "3.0005", "3", "3.0005", True),
        ("math", "3.002", "3", "3.002", False),
        ("math", "none at all", "0", "", False),
        ("math", "It is B, not A", "B", "B", True),
        ("math", "The answer is (D).", "D", "D", True),
        ("math", "All of it: D", "D", "A", False),
        ("math", "no letter", "A", "", False),
        ("glue-cola", "acceptable", "acceptable", "acceptable", True),
        ("glue-cola", " Acceptable.\nSentence: x", "acceptable", "acceptable", True),
        ("glue-cola", "unacceptable", "acceptable", "unacceptable", False),
        ("glue-rte", "", "unrelated", "", False),
        ("glue-stsb", "3.5 of 5", "3.4", "3.5", None),
        ("instruct", "Bark!", "Woof!", "Bark!", None),
    ],
)
def test_an_answer_is_judged_as_the_paper_judges(
    name: str, completion: str, reference: str, extracted: str, correct: bool | None
) -> None:
    assert judge(task(name), completion, reference) == Verdict(extracted, correct)


@given(st.text(max_size=200), st.sampled_from(["4", "-0.5", "B", "acceptable", ""]))
def test_no_answer_is_too_odd_to_judge(completion: str, reference: str) -> None:
    for name in ("commonsense", "math", "instruct", "glue-cola", "glue-stsb"):
        assert isinstance(judge(task(name), completion, reference), Verdict)


def test_wilsons_interval_is_the_textbooks() -> None:
    """Newcombe (1998), Statistics in Medicine 17, table I, method 3."""
    table = [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]
    for successes, trials, low, high in table:
        assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0


def verdicts(right: list[bool], references: list[str]) -> list[tuple[Verdict, str]]:
    return [
        (Verdict("", correct), reference)
        for correct, reference in zip(right, references, strict=True)
    ]


def test_a_score_counts_what_was_asked() -> None:
    found = score("exact", verdicts([True, False, True, True], ["a", "b", "c", "d"]))
    assert found.accuracy
    assert (found.asked, found.accuracy.correct, found.accuracy.share) == (4, 3, 0.75)
    assert (found.accuracy.low, found.accuracy.high) == wilson(3, 4)


def test_matthews_correlation_is_that_of_the_table_of_confusion() -> None:
    # 90 true positives, 5 false negatives, 3 false positives, 2 true negatives
    true = ["acceptable"] * 95 + ["unacceptable"] * 5
    said = ["acceptable"] * 90 + ["unacceptable"] * 5 + ["acceptable"] * 3 + ["unacceptable"] * 2
    tp, fn, fp, tn = 90, 5, 3, 2
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    found = score(
        "matthews",
        [(Verdict(word, word == wanted), wanted) for word, wanted in zip(said, true, strict=True)],
    )
    assert found.correlation == pytest.approx(expected)
    assert found.accuracy
    assert found.accuracy.share == 0.92


@pytest.mark.parametrize("word", ["acceptable", "", "nonsense"])
def test_matthews_correlation_of_answers_that_never_vary_is_0(word: str) -> None:
    true = ["acceptable"] * 7 + ["unacceptable"] * 3
    assert (
        score("matthews", [(Verdict(word, word == wanted), wanted) for wanted in true]).correlation
        == 0.0
    )


def test_matthews_correlation_of_many_classes_is_that_of_their_indicators() -> None:
    true = ["neutral", "neutral", "entailment", "entailment", "entailment", "contradiction"]
    said = ["neutral", "maybe", "entailment", "", "neutral", "contradiction"]
    classes = {"neutral": 0, "entailment": 1, "contradiction": 2}
    predicted_NC = np.eye(4)[[classes.get(word, 3) for word in said]]
    true_NC = np.eye(4)[[classes[word] for word in true]]

    def covariance(first: np.ndarray, second: np.ndarray) -> float:
        return float(((first - first.mean(0)) * (second - second.mean(0))).sum())

    spread = covariance(predicted_NC, predicted_NC) * covariance(true_NC, true_NC)
    found = score(
        "matthews",
        [(Verdict(word, word == wanted), wanted) for word, wanted in zip(said, true, strict=True)],
    )
    assert found.correlation == pytest.approx(covariance(predicted_NC, true_NC) / math.sqrt(spread))


def test_pearsons_correlation_is_of_the_numbers() -> None:
    judged = [
        (Verdict(answer, None), reference)
        for answer, reference in (("1", "2"), ("2", "4"), ("3", "6"))
    ]
    assert score("pearson", judged).correlation == pytest.approx(1.0)
    assert score("pearson", judged).accuracy is None
