"""How sure a difference between two scores on one dev set is.

Both models answer the same rows, and most of what makes a dev set easy or hard is alike for both. Where their
predictions and the labels are there, the difference is therefore taken row by row; else each score has the error that
it has at this number of rows. Neither says how much another seed would have changed.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distlm.finetune.records import FinetuneResults, PredictionFiles
from distlm.finetune.tasks.glue import TASKS, read_glue, task_folder
from distlm.finetune.tasks.metrics import squad_scores
from distlm.finetune.tasks.squad import read_squad
from distlm.models.complete import check_files
from distlm.runtime.files import load_array

Terms = npt.NDArray[np.float64]
"""[rows, 1 or 5] what a score is made of: it is a function of the means over the rows."""
_PLACE = "predictions/dev"
"""Below the folder of a seed."""
_SAME = 1e-6


def dev_rows(results: FinetuneResults) -> int:
    """Rows of the dev set that the task's metric is of; questions of SQuAD are counted by their windows."""
    return next(count for split, count in results.rows.items() if split.startswith("dev"))


def dev_terms(folder: Path, results: FinetuneResults, seed: str) -> Terms | None:
    """Of one seed's predictions for dev; `folder`: RUN/finetune/NAME, of these results.

    None where the predictions are not there, the labels are not in finetune.data_dir any more (or on the hub), or both
    do not give the score on record. Raises DistlmError for a file of predictions that is damaged.
    """
    place = folder / f"seed-{seed}" / _PLACE
    if not (place / PredictionFiles.NAME).exists() or results.settings.source != "folder":
        return None
    terms = (_squad if results.task == "SQuAD" else _glue)(place, results)
    if terms is None or abs(float(_score(terms.mean(0))) - results.seeds[seed].last[results.metric]) > _SAME:
        return None
    return terms


def paired_error(own: Sequence[Terms], other: Sequence[Terms]) -> float:
    """Standard error over the rows of the mean score of some models less that of others, on the same rows.

    By the jackknife, which leaves out each row in turn for all models at once (Efron & Tibshirani 1993, section 11.5).
    Of an accuracy, an exact match and SQuAD's F1, which are means over rows, that is the error of the paired t-test; of
    two accuracies McNemar's test has the same but for 1 / rows. Matthews' coefficient is Pearson's correlation of two
    labels, and like it a smooth function of means, of which the jackknife holds, too.
    """
    count = len(own[0])
    left_out = np.mean([_without_each(each) for each in own], 0) - np.mean([_without_each(each) for each in other], 0)
    return math.sqrt((count - 1) / count * float(np.square(left_out - left_out.mean()).sum()))


def score_error(metric: str, score: float, rows: int) -> float:
    """Standard error of a score (a share, or a correlation) at a number of rows, when no more is known.

    Of a mean of values from 0 to 1 √(p (1 − p) / rows): exact for an accuracy, the most that it can be for SQuAD's F1,
    whose rows are between right and wrong. Of a correlation, and so of Matthews' coefficient, 1 / √rows: what it is
    where predictions tell nothing; it is less where they do.
    """
    if metric in ("matthews", "pearson", "spearman"):
        return 1 / math.sqrt(rows)
    return math.sqrt(score * (1 - score) / rows)


def _glue(place: Path, results: FinetuneResults) -> Terms | None:
    task = TASKS[results.task]
    split = task.dev[0]
    files = task_folder(task, results.settings.data_dir)
    if results.metric not in ("accuracy", "matthews", "pearson") or not all(
        (files / f"{name}.tsv").is_file() for name in task.dev
    ):
        return None
    wanted = read_glue(task, results.settings, train=False)[split].labels.astype(np.float64)
    (name,) = check_files(place, PredictionFiles.MEND, f"{task.submission(split)}.logits", PredictionFiles)
    numbers = load_array(place / name, mapped=False)
    predicted = (numbers.argmax(1) if task.labels else numbers[:, 0]).astype(np.float64)
    if predicted.shape != wanted.shape:
        return None
    if results.metric == "accuracy":
        return (predicted == wanted)[:, None].astype(np.float64)
    x, y = predicted - predicted.mean(), wanted - wanted.mean()
    return np.stack([x, y, x * x, y * y, x * y], axis=1)


def _squad(place: Path, results: FinetuneResults) -> Terms | None:
    files = Path(results.settings.data_dir)
    if not any((files / f"dev-v1.1.json{end}").is_file() for end in ("", ".gz")):
        return None
    (name,) = check_files(place, PredictionFiles.MEND, "predictions.json", PredictionFiles)
    answers = json.loads((place / name).read_text("utf-8"))
    questions = read_squad(results.settings, train=False)["dev"].questions
    return np.array([[squad_scores(answers, [question])[results.metric]] for question in questions])


def _score(means: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[…, 1 or 5] → […]: the mean, or the correlation; 0 where either side is constant."""
    if means.shape[-1] == 1:
        return means[..., 0]
    x, y, xx, yy, xy = np.moveaxis(means, -1, 0)
    below = np.sqrt(np.maximum((xx - x * x) * (yy - y * y), 0))
    return np.divide(xy - x * y, below, out=np.zeros_like(below), where=below > 0)


def _without_each(terms: Terms) -> npt.NDArray[np.float64]:
    """[rows] the score without each of the rows."""
    return _score((terms.sum(0) - terms) / (len(terms) - 1))
