"""Evaluations of several runs by the names that a command line gives them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distlm.config.load import load_config
from distlm.data.text.shown import Shown
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.knnlm.evaluate.losses import Losses
from distlm.knnlm.evaluate.records import NAMES
from distlm.knnlm.evaluate.table import PART_WORDS
from distlm.runtime.rundir import RunDir


@dataclass(frozen=True)
class Evaluation:
    """The losses of one run under one model or mixture."""

    label: str
    """The run's folder (its last part, where that tells the runs apart), and the mixture in words; each once."""
    run: RunDir
    losses: Losses


def open_evaluations(texts: Sequence[str], split: str, names: Sequence[str]) -> list[Evaluation]:
    """RUN_DIR:NAME is that evaluation, NAME being lm, cache, knn or both; RUN_DIR alone those of `names` that it has.
    What is named twice is there once.

    Raises DistlmError when there is no such evaluation, or when two are not of the same tokens.
    """
    chosen: dict[tuple[Path, str], None] = {}
    for text in texts:
        folder, _, name = text.rpartition(":")
        if name not in NAMES:
            folder, name = text, ""
        root = Path(os.path.realpath(folder))
        if not root.is_dir():
            raise DistlmError(f"{folder}: there is no such run; give RUN_DIR or RUN_DIR:NAME, {' or '.join(NAMES)}")
        losses = RunDir(root).losses / split
        there = [part for part in names if (losses / f"{part}.npy").exists()] or list(names[:1])
        chosen |= {(root, part): None for part in ([name] if name else there)}
    roots = {root for root, _ in chosen}
    short = len({root.name for root in roots}) == len(roots)
    found = []
    for root, part in chosen:
        label = f"{root.name if short else root}: {PART_WORDS[part]}"
        found.append(Evaluation(label, RunDir(root), Losses.open(RunDir(root).losses, split, part)))
    first = found[0].losses
    for evaluation in found[1:]:
        other = evaluation.losses
        same = first.facts.dictionary == other.facts.dictionary
        if not same or not np.array_equal(first.targets, other.targets):
            raise DistlmError(
                f"{first.folder / split} and {other.folder / split} are not of the same tokens: evaluate both on the "
                "same split of the same token files"
            )
    return found


def shown_of(run: RunDir, losses: Losses) -> Shown:
    """How the tokens of some losses are shown: by the run's token files, where they are there and of that dictionary;
    else as the dictionary has them."""
    try:
        tokens = TokenFiles.open(run.tokens(load_config(str(run.root))))
        if tokens.dictionary.hash == losses.facts.dictionary:
            return Shown.of(tokens)
    except DistlmError:
        # The losses are compared without the text that they are of.
        pass
    return Shown(losses.words())
