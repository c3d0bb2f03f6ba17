"""Metrics against values computed by hand."""

import math

import numpy as np
import pytest

from distlm.finetune.tasks.glue import TASKS, Examples
from distlm.finetune.tasks.metrics import (
    answer_f1,
    glue_scores,
    majority_answer_scores,
    majority_scores,
    normalised,
    squad_scores,
)
from distlm.finetune.tasks.squad import Question


def test_metrics_of_two_labels() -> None:
    predicted = [1] * 6 + [1] * 1 + [0] * 3 + [0] * 2
    wanted = [1] * 6 + [0] * 1 + [1] * 3 + [0] * 2
    # 6 right positives, 1 wrong positive, 3 wrong negatives, 2 right negatives.
    found = glue_scores(("accuracy", "f1", "matthews"), predicted, wanted)
    assert found["accuracy"] == pytest.approx(8 / 12)
    assert found["f1"] == pytest.approx(2 * 6 / (2 * 6 + 1 + 3))
    assert found["matthews"] == pytest.approx((6 * 2 - 1 * 3) / math.sqrt(7 * 9 * 3 * 5))


def test_correlations() -> None:
    predicted, wanted = [1.0, 2.0, 3.0, 5.0], [1.0, 3.0, 2.0, 10.0]
    found = glue_scores(("pearson", "spearman"), predicted, wanted)
    a, b = np.array(predicted) - 2.75, np.array(wanted) - 4.0
    assert found["pearson"] == pytest.approx(float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())))
    # Ranks 1 2 3 4 and 1 3 2 4: 1 − 6·(0 + 1 + 1 + 0) / (4·15).
    assert found["spearman"] == pytest.approx(1 - 12 / 60)


def test_constant_predictions_are_worth_nothing_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert glue_scores(("pearson", "spearman"), [2.0, 2.0], [1.0, 2.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert glue_scores(("matthews", "f1"), [0, 0, 0], [0, 1, 1]) == {"matthews": 0.0, "f1": 0.0}
    assert not recwarn.list


def test_the_majority_is_the_best_constant_answer_for_each_metric() -> None:
    dev = Examples(["a"] * 4, None, np.array([0, 0, 0, 1]))
    assert majority_scores(TASKS["SST-2"], dev) == {"accuracy": 0.75}
    assert majority_scores(TASKS["MRPC"], dev) == {"accuracy": 0.75, "f1": pytest.approx(2 / 5)}
    assert majority_scores(TASKS["CoLA"], dev) == {"matthews": 0.0, "accuracy": 0.75}
    scores = Examples(["a"] * 2, ["b"] * 2, np.array([1.0, 4.0]))
    assert majority_scores(TASKS["STS-B"], scores) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Norman  Conquest!", "norman conquest"),
        ("an apple, a pear", "apple pear"),
        ("Theatre of the U.S.", "theatre of us"),
        ("«Ängström»", "«ängström»"),
        (" . ", ""),
    ],
)
def test_normalised_answers(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_f1_of_answers_counts_words_as_often_as_they_stand_there() -> None:
    assert answer_f1("the cat sat", "a cat") == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert answer_f1("no no", "no") == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert answer_f1("dog", "cat") == 0.0
    # As the official script: two answers without words do not match in F1, but exactly.
    assert answer_f1("the", "a") == 0.0


def question(name: str, *answers: str) -> Question:
    return Question(name, "?", 0, answers, 0)


def test_squad_takes_the_best_answer_and_counts_what_is_missing() -> None:
    questions = [question("1", "October 1973", "1973"), question("2", "blue"), question("3", "red")]
    found = squad_scores({"1": "in 1973", "2": "Blue."}, questions)
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx((2 * 0.5 * 1 / 1.5 + 1) / 3)


def test_the_majority_answer() -> None:
    train = [question("1", "Two"), question("2", "two"), question("3", "three")]
    dev = [question("4", "two"), question("5", "two dogs")]
    found = majority_answer_scores(train, dev)
    assert found["exact_match"] == 0.5 and found["f1"] == pytest.approx((1 + 2 / 3) / 2)
