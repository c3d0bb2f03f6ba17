"""Metrics of the tasks, and what a constant answer reaches: scikit-learn and scipy for GLUE, SQuAD's own rules.

Values are shares or correlations, not percent.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from distlm.errors import DistlmError
from distlm.finetune.tasks.glue import Examples, GlueTask
from distlm.finetune.tasks.squad import Question
from distlm.installed import install

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def glue_scores(names: Sequence[str], predictions: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, float]:
    """Metric → value, for predictions and labels [n]: accuracy, f1 (of label 1), matthews, pearson, spearman.

    A correlation with constant predictions is 0.
    """
    predicted, wanted = np.asarray(predictions), np.asarray(labels)
    if predicted.shape != wanted.shape:
        raise ValueError(f"{predicted.shape} predictions for {wanted.shape} labels")
    return {name: _score(name, predicted, wanted) for name in names}


def _score(name: str, predicted: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    learn, stats = _libraries()
    if name in ("pearson", "spearman"):
        if np.ptp(predicted) == 0 or np.ptp(wanted) == 0:
            return 0.0
        correlate = stats.pearsonr if name == "pearson" else stats.spearmanr
        return float(correlate(predicted, wanted).statistic)
    if name == "f1":
        return float(learn.f1_score(wanted, predicted, zero_division=0.0))
    return float((learn.matthews_corrcoef if name == "matthews" else learn.accuracy_score)(wanted, predicted))


def majority_scores(task: GlueTask, dev: Examples) -> dict[str, float]:
    """The best that one answer for all examples reaches on dev, for each metric.

    The answer is chosen on dev: where train is balanced, its majority is a draw, and a poor model would look good.
    """
    answers = range(max(len(task.labels), 1))  # Correlations of a regression's constant answer are 0, whatever it is.
    scores = [glue_scores(task.metrics, np.full(len(dev), answer), dev.labels) for answer in answers]
    return {name: max(score[name] for score in scores) for name in task.metrics}


def squad_scores(predictions: Mapping[str, str], questions: Sequence[Question]) -> dict[str, float]:
    """f1 and exact_match over all questions; predictions: id of the question → answer (none: wrong).

    As the official script (Rajpurkar et al. 2016): each question's best over its answers, after `normalised`.
    """
    f1 = exact = 0.0
    for question in questions:
        if (given := predictions.get(question.id)) is not None:
            f1 += max(answer_f1(given, answer) for answer in question.answers)
            exact += max(normalised(given) == normalised(answer) for answer in question.answers)
    return {"f1": f1 / len(questions), "exact_match": exact / len(questions)}


def majority_answer_scores(train: Sequence[Question], dev: Sequence[Question]) -> dict[str, float]:
    """What the most frequent answer of train reaches on dev; among equally frequent ones, the first by alphabet."""
    counts = Counter(normalised(question.answers[0]) for question in train)
    answer = min(counts, key=lambda text: (-counts[text], text))
    return squad_scores({question.id: answer for question in dev}, dev)


def answer_f1(given: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of the normalised words, as multisets."""
    ours, theirs = (Counter(normalised(text).split()) for text in (given, wanted))
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, words one space apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _libraries() -> tuple[Any, Any]:
    try:
        import scipy.stats
        import sklearn.metrics
    except ImportError as error:
        raise DistlmError(f"metrics of fine-tuning need scikit-learn and scipy: {install('plm')} ({error})") from error
    return sklearn.metrics, scipy.stats
