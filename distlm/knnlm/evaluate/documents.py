"""Which document each evaluated token belongs to: the unit of resampling and of cross-fitting.

Tokens of one text are not independent, so intervals and held-out halves are over texts. WikiText's articles begin with
a line ` = Title = `; its sections have more signs (` = = Section = = `).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from distlm.data.blocks import eval_blocks
from distlm.data.dictionary import Dictionary
from distlm.knnlm.search.records import SplitPlan
from distlm.runtime.files import json_hash

LEAST_DOCUMENTS = 10
"""Fewer documents than this say nothing of an interval; evaluation blocks are taken instead."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Groups:
    """The split's tokens, grouped."""

    kind: Literal["documents", "blocks"]
    starts: Ints
    """int64 [G]: first token of each group, rising from 0."""
    tokens: int
    """Q."""

    @property
    def numbers(self) -> Ints:
        """Group of each token: int64 [Q]."""
        return np.repeat(np.arange(len(self.starts)), np.diff(self.starts, append=self.tokens))

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the groups: equal for equal halves."""
        return json_hash([self.kind, self.tokens, self.starts.tolist()])

    @property
    def halves(self) -> Ints:
        """0 or 1 for each token: int64 [Q]. Neighbouring groups fall into different halves."""
        return self.numbers % 2


def group_tokens(targets: npt.NDArray[np.integer], dictionary: Dictionary, source: SplitPlan) -> Groups:
    """Documents of a split's tokens [Q], or its evaluation blocks where it has fewer than LEAST_DOCUMENTS.

    `source` is the manifest of its neighbours or states, which holds the block plan.
    """
    ids = np.asarray(targets)
    starts = document_starts(ids, dictionary)
    if len(starts) >= LEAST_DOCUMENTS:
        # What stands before the first title (a blank line) goes with the first document.
        starts[0] = 0
        return Groups("documents", starts, len(ids))
    blocks = eval_blocks(ids, source.context_window, source.block)
    return Groups("blocks", blocks.start, len(ids))


def document_starts(ids: npt.NDArray[np.integer], dictionary: Dictionary) -> Ints:
    """First token of every line ` = Title = ` among `ids` [Q]: int64, rising."""
    sign = dictionary.encode("=")
    if sign == Dictionary.UNK:
        return np.empty(0, np.int64)
    last = np.flatnonzero(ids == Dictionary.EOS)
    first = np.concatenate([[0], last[:-1] + 1]) if len(last) else last
    is_sign = np.asarray(ids == sign)
    before = np.concatenate([[0], np.cumsum(is_sign)])
    title = (
        (last - first >= 3) & is_sign[first] & is_sign[np.maximum(last - 1, 0)] & (before[last] - before[first] == 2)
    )
    return first[title].astype(np.int64)
