"""`distlm.KnnLogitsProcessor`: neighbours in Hugging Face's `generate`."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError
from distlm.installed import install
from distlm.integrations.gated import GeneratedBefore
from distlm.integrations.knn_lm import KnnLM
from distlm.integrations.mixture import mixed
from distlm.integrations.taps import NewestStates
from distlm.knnlm.scoring import Floats

try:
    from transformers import LogitsProcessor
except ImportError as error:
    raise DistlmError(f"KnnLogitsProcessor needs transformers: {install('hf')} ({error})") from error


class KnnLogitsProcessor(LogitsProcessor):
    """Scores of the model become log-probabilities of λ p_kNN + (1 − λ) p_LM (Khandelwal et al. 2020, eqs. 2 and 3).

        model.generate(**inputs, logits_processor=[distlm.KnnLogitsProcessor(knn, lam=0.25)])

    The query of each row is the hidden state of its newest token, which a hook takes from the pass that `generate`
    makes anyway: with and without past key values, in batches padded on the left, and with beams, whose rows are in
    order when they are scored. Temperature, top-k and top-p of `generate` come after it; what a processor before it
    has forbidden (−∞) stays forbidden. Greedy search, sampling and beam search use it; assisted decoding, whose one
    pass is for many tokens, does not.

    Where λ is a gate's (KnnLM.of_run(run, mixture="gate")), only rows whose λ is above 0 are searched for. Its features
    are ln p under the scores that this processor is given, so it is the first of several.

    The hooks stand on the model until `close`, or until the processor is gone; they copy B × D numbers a pass, with a
    gate five times as many.
    """

    def __init__(
        self, knn_lm: KnnLM, lam: float | None = None, temperature: float | None = None, k: int | None = None
    ) -> None:
        """`lam` (λ), `temperature` (T, of squared L2) and `k`: where None those of knn_lm.mixing, and with no `lam`
        its buckets (λ by the nearest distance) or its gate, too. Raises DistlmError for a KnnLM without an index,
        UsageError for values that cannot be."""
        self._knn = knn_lm
        self.mixing = knn_lm.mixed(lam, temperature, k)
        """λ, temperature and k."""
        self._retriever = knn_lm.retriever
        self._newest = NewestStates(knn_lm.model, knn_lm.tap)
        self._before = None
        if self.mixing.gate is not None:
            self._before = GeneratedBefore(knn_lm.model, knn_lm.lm.full_log_probs, self._known_rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids int64 [B, T] and scores [B, V], logits or log-probabilities → log-probabilities, fp32 [B, V].

        Raises DistlmError when the model of the KnnLM has not just made a pass for these rows.
        """
        state, tokens = self._newest.take(len(scores))
        if tokens is not None and not torch.equal(tokens.to(input_ids.device), input_ids[:, -1]):
            raise DistlmError(
                "KnnLogitsProcessor: the last pass of the model of its KnnLM was not for these tokens: give it to "
                "`generate` of that model, and one generation at a time"
            )
        if not self.mixing.searches:
            return scores.float().log_softmax(dim=1)
        states = state.float().cpu().numpy()
        if self.mixing.gate is not None:
            return self._gated(self._lambdas(input_ids, scores, states), scores, states)
        near = self._retriever.search(states, self.mixing.k, self.mixing.candidates)
        columns = self._knn.pieces(near.values)
        return mixed(scores, columns, near.shares(self.mixing.temperature), self.mixing.lambdas(near))

    def close(self) -> None:
        """Take the hooks off the model."""
        self._newest.close()
        if self._before is not None:
            self._before.close()

    def _lambdas(self, input_ids: Tensor, scores: Tensor, states: npt.NDArray[np.float32]) -> Floats:
        """λ of each row by the gate: fp64 [B]."""
        gate, before = self.mixing.gate, self._before
        assert gate is not None and before is not None
        others = before.others(input_ids, scores, gate.counts)
        # As a search would, which finds what is not finite.
        return gate.lambdas(self._retriever.queries(states), others)

    def _known_rows(self, pieces: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Ids of the dictionary; <unk> of a row of the model that the tokenizer has no piece for."""
        rows = self._knn.rows_of_pieces(pieces)
        return np.where(rows < self._knn.subwords.size, rows, Dictionary.UNK)

    def _gated(self, lambdas: Floats, scores: Tensor, states: npt.NDArray[np.float32]) -> Tensor:
        """The mixture, with neighbours of those rows alone that have a λ above 0."""
        rows = np.flatnonzero(lambdas > 0)
        tokens, shares = np.full((len(scores), 1), -1), np.zeros((len(scores), 1))
        if len(rows):
            near = self._retriever.search(states[rows], self.mixing.k, self.mixing.candidates)
            tokens = np.full((len(scores), near.values.shape[1]), -1)
            shares = np.zeros(tokens.shape)
            tokens[rows], shares[rows] = self._knn.pieces(near.values), near.shares(self.mixing.temperature)
            # Nothing found: the model alone.
            lambdas = np.where(tokens[:, 0] >= 0, lambdas, 0.0)
        return mixed(scores, tokens, shares, lambdas)
