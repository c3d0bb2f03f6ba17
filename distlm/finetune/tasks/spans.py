"""Answers to SQuAD's questions from the scores of where they begin and end."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distlm.finetune.tasks.features import Windows
from distlm.finetune.tasks.squad import Squad

CANDIDATES = 20
"""Beginnings and ends of each window that are combined (n-best, as Hugging Face's examples)."""


class Candidates(NamedTuple):
    """The best beginnings and ends in each row, [n, 2, c] each: of beginnings and of ends, best first.

    -inf where a row has fewer tokens of paragraph.
    """

    scores: npt.NDArray[np.floating]
    places: npt.NDArray[np.integer]
    """Token of the row."""


def decode_answers(
    squad: Squad, windows: Windows, candidates: Candidates, longest: int, block: int = 4096
) -> dict[str, str]:
    """Id of each question → text: the span of at most `longest` tokens with the highest sum of both scores in all
    windows of the question; of equal ones the first. A question without a possible span gets ''."""
    count = len(squad)
    best, where = np.full(count, -np.inf), np.zeros((count, 3), np.int64)
    for start in range(0, len(windows.rows), block):
        rows = slice(start, start + block)
        scores, places = candidates.scores[rows].astype(np.float64), candidates.places[rows]
        length = places[:, 1, None, :] - places[:, 0, :, None]
        total = np.where((length >= 0) & (length < longest), scores[:, 0, :, None] + scores[:, 1, None, :], -np.inf)
        flat = total.reshape(len(total), -1)
        chosen = flat.argmax(1)
        for row, (place, score) in enumerate(zip(chosen, flat[np.arange(len(flat)), chosen], strict=True)):
            number = windows.question[start + row]
            if score > best[number]:
                first, last = divmod(int(place), places.shape[2])
                best[number] = score
                where[number] = start + row, places[row, 0, first], places[row, 1, last]
    answers = {}
    for number, question in enumerate(squad.questions):
        row, first, last = where[number]
        answers[question.id] = ""
        if best[number] > -np.inf:
            shift = int(windows.first_token[row]) - int(windows.rows.second[row])
            offsets = windows.offsets[question.context]
            begin, end = offsets[first + shift, 0], offsets[last + shift, 1]
            answers[question.id] = squad.contexts[question.context][begin:end]
    return answers
