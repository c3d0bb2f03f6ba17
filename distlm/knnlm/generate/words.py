"""Text from a kNN-LM, word by word, with the training contexts behind every word.

p(next) = (1 − λ) p_LM + λ p_kNN over the whole dictionary, with λ, temperature and k as frozen in knn.json: the same
forward pass, index and distances as the evaluation. A model that can keep its attention's keys and values computes one
state a step (LanguageModel.new_past); for others every state is computed anew from the last words, which is slow for
long texts, and exact. Words that no text can hold (<s>, <pad>, padding of the dictionary) are
never drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from distlm.data.dictionary import Dictionary
from distlm.data.text.shown import Shown
from distlm.datastore.rows import gathered
from distlm.errors import DistlmError
from distlm.knnlm.evaluate.parts import Frozen
from distlm.knnlm.generate.growing import Growing
from distlm.knnlm.scoring import Floats
from distlm.knnlm.search.forward import Forward
from distlm.knnlm.search.source import Source

Ids = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Sampling:
    """How words are chosen, and what is shown of them."""

    tokens: int
    """Words to generate."""
    greedy: bool
    """The most probable word (of equal ones the first in the dictionary) instead of a drawn one."""
    seed: int
    """Of the draws; the number of a step decides its draw, so that two models are given the same ones."""
    top_p: float
    """Draw among the fewest words that have this probability together (Holtzman et al. 2020); 1: among all."""
    shown: int
    """Neighbours kept of each word."""
    context: int
    """Words of a neighbour's context that are kept."""


@dataclass(frozen=True)
class Retrieved:
    """One neighbour of a generated word."""

    row: int
    """Row of the store."""
    token: int
    """Place of its value in the tokens of the stored split."""
    context: str
    """The stored text before the value, in one line; empty before the store's first row."""
    word: str
    """Its value."""
    hangs: bool
    """It is a piece with no blank between it and the token before."""
    hit: bool
    """The value is the generated word."""
    distance: float
    """Squared L2 to the query."""
    weight: float
    """Its share of p_kNN, over all k neighbours."""


@dataclass(frozen=True)
class Found:
    """Neighbours of one query, nearest first: [≤ k] each."""

    rows: Ids
    values: Ids
    weights: Floats
    """Shares of p_kNN, summing to 1."""
    distances: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Next:
    """Probabilities of the next word: fp64 [V] each."""

    p: Floats
    """Of the mixture."""
    lm: Floats
    knn: Floats | None
    """None without neighbours."""
    found: Found | None


@dataclass(frozen=True)
class Word:
    """One generated word."""

    word: str
    hangs: bool
    """It is a piece with no blank between it and the token before."""
    token: int
    """Its id."""
    p: float
    """Probability under the mixture."""
    p_lm: float
    """Under the language model alone."""
    p_knn: float | None
    """Among the neighbours; None without neighbours."""
    neighbours: list[Retrieved]
    """The nearest first."""


class Generator:
    """A language model, and with `source` and `frozen` its neighbours. Raises DistlmError for an unusable model."""

    def __init__(self, forward: Forward, frozen: Frozen | None = None) -> None:
        """`forward` is a Source where `frozen` is given."""
        self._forward, self._frozen = forward, frozen
        self._text = Growing(forward.model)
        self._longest = forward.longest
        self.shown = Shown.of(forward.tokens)
        self.possible = self.shown.in_text(forward.tokens.dictionary.counts)
        """bool [V]: words that a text can hold."""

    def run(self, prompt: Sequence[int], sampling: Sampling) -> list[Word]:
        """Continue `prompt`, ids of a text, by sampling.tokens words."""
        ids, words = list(prompt), []
        for step in range(sampling.tokens):
            word, chosen = self._step(ids, step, sampling)
            ids.append(chosen)
            words.append(word)
        return words

    def next_word(self, ids: Sequence[int]) -> Next:
        """Probabilities of every word after the text `ids`; they sum to 1.

        Where no neighbour is found the mixture is the language model's own. The figure of one token there
        (`distlm knn evaluate`, score_text) is (1 − λ) p_LM.
        """
        lm, query = self._language_model(ids)
        if self._frozen is None:
            return Next(lm, lm, None, None)
        found = self._neighbours(query)
        if not len(found.rows):
            return Next(lm, lm, None, found)
        knn = np.bincount(found.values, found.weights, minlength=len(lm)).astype(np.float64)
        return Next((1 - self._frozen.weight) * lm + self._frozen.weight * knn, lm, knn, found)

    def _step(self, ids: Sequence[int], step: int, sampling: Sampling) -> tuple[Word, int]:
        at = self.next_word(ids)
        chosen = choose(np.where(self.possible, at.p, 0.0), step, sampling)
        neighbours = self._describe(at.found, chosen, sampling) if at.found is not None else []
        among = float(at.knn[chosen]) if at.knn is not None else None
        hangs, text = self.part(ids, chosen)
        return Word(text, hangs, chosen, float(at.p[chosen]), float(at.lm[chosen]), among, neighbours), chosen

    @torch.inference_mode()
    def _language_model(self, ids: Sequence[int]) -> tuple[Floats, npt.NDArray[np.floating] | None]:
        """p_LM of every word after the text `ids`, fp64 [V], and the query [1, D] in the keys' dtype, if any."""
        model = self._forward.model
        tap = self._forward.datastore.tap if isinstance(self._forward, Source) else None
        # As in evaluation, a text begins after </s>, or after what the model has in front of each block.
        inputs = [Dictionary.EOS, *ids][-self._longest :]
        if model.begins:
            inputs[0] = Dictionary.BOS
        output = self._text.states(inputs, tap)
        assert output.hidden is not None
        log_probs = model.full_log_probs(output.hidden[0, -1:])[0].double().cpu().numpy()
        if not np.isfinite(log_probs).any():
            raise DistlmError("the model gives undefined probabilities; use another checkpoint")
        if tap is None:
            return np.exp(log_probs), None
        assert isinstance(self._forward, Source) and output.tapped is not None
        query = output.tapped[0, -1:].float().cpu().numpy().astype(self._forward.key_dtype)
        return np.exp(log_probs), query

    def _neighbours(self, query: npt.NDArray[np.floating] | None) -> Found:
        """The frozen k neighbours of a query [1, D], nearest first."""
        source, frozen = self._forward, self._frozen
        assert isinstance(source, Source) and frozen is not None and query is not None
        # As many as the evaluation had searched for, whose first k were tuned on.
        ids, distances, values = source.nearest(query, max(source.knn.k, frozen.k))
        there = ids[0, : frozen.k] >= 0
        near = distances[0, : frozen.k][there]
        weights = np.exp((near[:1].astype(np.float64) - near) / frozen.temperature)
        return Found(ids[0, : frozen.k][there], values[0, : frozen.k][there], weights / weights.sum(), near)

    def part(self, ids: Sequence[int], token: int) -> tuple[bool, str]:
        """Whether a token after the text `ids` hangs on it, and its text."""
        return self.shown.parts([token], ids[-1] if len(ids) else Dictionary.EOS)[0]

    def _describe(self, found: Found, chosen: int, sampling: Sampling) -> list[Retrieved]:
        """The heaviest neighbours; up to half of them those whose value is the word `chosen`."""
        hits, others = (np.flatnonzero((found.values == chosen) == hit) for hit in (True, False))
        hits = hits[: max(-(-sampling.shown // 2), sampling.shown - len(others))]
        shown = np.sort(np.concatenate([hits, others[: sampling.shown - len(hits)]])).tolist()
        return [self.retrieved(found, place, chosen, sampling.context) for place in shown]

    def retrieved(self, found: Found, place: int, chosen: int, context: int) -> Retrieved:
        """Neighbour number `place` of a query, with `context` tokens before it, as one of the word `chosen`.

        They are the values of the rows before, so that they are the store's own text, whatever token files this run
        has. At the store's beginning there are fewer: the tokens before its first row are not stored.
        """
        assert isinstance(self._forward, Source)
        store = self._forward.datastore
        row, value = int(found.rows[place]), int(found.values[place])
        token = row + store.manifest.context.context_window
        before = gathered(store, np.arange(max(0, row - context), row), "values", np.int32).tolist()
        # The first tokens may be the end of a word that is not shown.
        whole = [at for at, (hangs, _) in enumerate(self.shown.parts(before)) if not hangs]
        text = self.shown.line(before[whole[0] if whole else 0 :]).lstrip(" ")
        hangs, word = self.part(before, value)
        distance, weight = float(found.distances[place]), float(found.weights[place])
        return Retrieved(row, token, text, word, hangs, value == chosen, distance, weight)


def choose(p: Floats, step: int, sampling: Sampling) -> int:
    """A word of the unnormalised probabilities `p` fp64 [V]: a pure function of its arguments."""
    if sampling.greedy:
        return int(p.argmax())
    order = np.argsort(-p, kind="stable")
    rising = np.cumsum(p[order])
    kept = rising[: int(np.searchsorted(rising, sampling.top_p * rising[-1])) + 1]
    draw = np.random.Generator(np.random.Philox(key=[sampling.seed, step])).random() * kept[-1]
    return int(order[min(int(np.searchsorted(kept, draw, side="right")), len(kept) - 1)])
