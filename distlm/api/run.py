"""`distlm.open_run`: everything a run directory holds, each part opened when it is first asked for."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distlm.api.parts import Parts
from distlm.config.load import load_config
from distlm.config.recipe import RUN_CONFIG
from distlm.config.schema import RunConfig
from distlm.errors import DistlmError, UsageError
from distlm.runtime.rundir import RunDir
from distlm.system_errors import told

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distlm.api.next_word import NextWord
    from distlm.api.search import Index
    from distlm.api.words import Words
    from distlm.datastore.reader import Datastore
    from distlm.knnlm.evaluate.records import Results
    from distlm.knnlm.evaluate.text import TextScores
    from distlm.knnlm.search.neighbours import Neighbours
    from distlm.models.language_model import LanguageModel
    from distlm.training.records import LmResults


def open_run(path: str | os.PathLike[str], *settings: str, device: torch.device | str = "cpu") -> Run:
    """Open the run directory `path` for reading.

    `settings`: `section.key=value` over those of its latest stage, as for the commands; "knn.nprobe=8" asks another
    question of the same store. `device`: where the model computes. Nothing is loaded yet, nothing is ever written, and
    one process is enough, however many ranks made the run.

    Raises DistlmError when there is no run at `path`, UsageError for settings that a command would refuse, too.
    """
    root = Path(path)
    with told(root):
        if not (root / RUN_CONFIG).is_file():
            there = "has no config.yaml, so it is no run directory" if root.is_dir() else "there is no such folder"
            raise DistlmError(f"{root}: {there}; `distlm run RECIPE run_dir={shlex.quote(str(root))}` makes a run")
        # A recipe of the package goes before a folder of its name; this is meant to be the folder.
        return Run(load_config(str(path) if root.is_absolute() else f"./{root}", settings), device, settings)


class Run:
    """A run directory, read-only. Parts are opened when they are first asked for, and kept.

    A part that is not there, or not finished, raises DistlmError, which names it and the command that makes it. Of a
    masked language model there are config, words, model and results; the rest raises DistlmError.
    """

    def __init__(self, config: RunConfig, device: torch.device | str = "cpu", settings: Sequence[str] = ()) -> None:
        """Use open_run. `settings`: those on top of the run's own, for messages."""
        self.config = config
        """Every setting, e.g. `run.config.knn.k`."""
        self._run, self._parts = RunDir.of(config), Parts(config, device, settings)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.config.model.kind})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._run.root

    @property
    def label(self) -> str:
        """Name of the question that config.index and config.knn ask: of the folders of neighbours and results."""
        return self._run.label

    @property
    def words(self) -> Words:
        """Ids and words: `encode(text)` → int32 [T], `decode(ids)` → text, `[id]` → word, `id_of(word)`, `len`."""
        return self._parts.words

    def tokens(self, split: str) -> npt.NDArray[np.int32]:
        """Ids of a split, memory-mapped and read-only: int32 [T]. Raises DistlmError when there is no such split."""
        return self._parts.tokens.split(split)

    @property
    def model(self) -> LanguageModel | nn.Module:
        """The model with its weights, fp32, in eval mode, on the device of open_run.

        A LanguageModel: `forward(ids [B, T])` gives its hidden states, `full_log_probs(hidden [n, D])` the logarithm of
        each word's probability. Of a masked language model: distlm.models.plm.model.Plm with its memories.
        """
        return self._parts.model

    @property
    def checkpoint(self) -> Path:
        """Folder of the model: datastore.checkpoint, else the best one of the run."""
        return self._parts.checkpoint

    @property
    def datastore(self) -> Datastore:
        """Keys and values: `keys, values = run.datastore[rows]` with an int, a slice or an array of row numbers from 0
        (keys float16 or float32 [..., D], values int32 [...]), `len`, `width`, `shards`. Memory-mapped: rows are read
        when they are asked for, and a slice within a shard is a view of the file.
        """
        return self._parts.datastore

    @property
    def index(self) -> Index:
        """The index: `search(vectors [n, D], k, nprobe)` → ids, distances, values, words; `len`, `width`, `nlist`."""
        return self._parts.index

    def neighbours(self, split: str, label: str | None = None) -> Neighbours:
        """What `distlm knn search` kept of every token of a split: `units()` gives memory-mapped arrays (queries
        [q, D], targets, log_probs, and ids, distances, values [q, k] each), `targets()` and `log_probs()` all of them.

        `label`: another question of the run, by the name of its folder; None: the one that config asks. Raises
        DistlmError when it was not searched, naming those that were.
        """
        from distlm.knnlm.search.neighbours import Neighbours

        folder = self._parts.neighbours(split, label)
        return Neighbours.asked(self._run, split, self.config.knn) if label is None else Neighbours.open(folder)

    def log_probs(
        self,
        text: str | Sequence[int] | npt.NDArray[np.integer[Any]],
        *,
        knn: bool = True,
        lam: float | None = None,
        temperature: float | None = None,
        k: int | None = None,
    ) -> TextScores:
        """Natural logarithm of the probability of each token of a text, or of its ids: `lm`, `knn` and `mixed`, fp64
        [T] each, with the tokens as `ids` int32 [T].

        The text is scored as `distlm knn evaluate` scores a split: in blocks of whole lines of at most knn.block
        tokens, with up to knn.context_window tokens before each, the first token after </s>. `knn=False`: the language
        model alone. `lam` (λ of p = λ p_kNN + (1 − λ) p_LM, Khandelwal et al. eq. 3), `temperature` (in units of
        squared L2) and `k` are as `distlm knn tune` chose them, unless they are given. Where the index finds no
        neighbour p_kNN is 0 and the mixture (1 − λ) p_LM, as in the evaluation; `next_word` has p_LM there.

        Raises UsageError for an empty text, ids outside 0..V−1, λ outside [0, 1], and T or k that are not above 0.
        """
        from distlm.knnlm.evaluate.text import score_text

        ids = self._ids(text)
        if not knn:
            return score_text(self._parts.forward, ids, self.config.datastore.tap, None)
        frozen = self._parts.frozen(lam, temperature, k)
        return score_text(self._parts.source, ids, self.datastore.tap, frozen)

    def next_word(
        self,
        prompt: str | Sequence[int] | npt.NDArray[np.integer[Any]],
        top: int = 10,
        *,
        knn: bool = True,
        lam: float | None = None,
        temperature: float | None = None,
        k: int | None = None,
        contexts: int = 4,
        context: int = 12,
    ) -> list[NextWord]:
        """The `top` most probable words after a prompt: `word`, `p` of the mixture, `lm`, `knn`, and `contexts`, the
        nearest neighbours that hold this word, at most so many, with the `context` words before each in the stored
        text, its place `token` there, `distance` (squared L2) and `weight` (its share of p_kNN).

        The probabilities are those that `distlm generate` draws from, with as many tokens before the word as
        knn.context_window + knn.block allows. Over all words they sum to 1: they are the language model's own where no
        neighbour is found. `knn`, `lam`, `temperature`, `k` and what is raised: see log_probs; a
        prompt may be empty.
        """
        from distlm.api.next_word import next_words

        for name, value, least in (("top", top, 1), ("contexts", contexts, 0), ("context", context, 0)):
            if value < least:
                raise UsageError(f"{name}={value}: must be at least {least}")
        ids = self._ids(prompt).tolist()
        if not knn:
            return next_words(self._parts.generator(None), ids, top, 0, 0)
        generator = self._parts.generator(self._parts.frozen(lam, temperature, k))
        return next_words(generator, ids, top, contexts, context)

    @property
    def results(self) -> Results | None:
        """results.json of the question that config asks, perplexities of every split among it; None where nothing was
        evaluated (`distlm knn evaluate`). distlm.knnlm.evaluate.records.Results says what is in it."""
        from distlm.knnlm.evaluate.records import Results

        return Results.read(self._run.results) if self._parts.causal and self._run.results.is_file() else None

    @property
    def lm_results(self) -> LmResults | None:
        """lm.json, what `distlm evaluate` found for the model without neighbours; None where it was not run."""
        from distlm.training.finished import RESULT
        from distlm.training.records import LmResults

        path = self.path / RESULT
        return LmResults.read(path) if path.is_file() else None

    def _ids(self, text: str | Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int32]:
        self._parts.require_causal()
        if isinstance(text, str):
            return self.words.encode(text)
        ids = np.asarray(text)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise UsageError(f"a text is a string or the ids of one, ints [T], not {ids.dtype} {list(ids.shape)}")
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.words):
            raise UsageError(f"ids {int(ids.min())} to {int(ids.max())}: ids are 0 to {len(self.words) - 1}")
        return ids.astype(np.int32)
