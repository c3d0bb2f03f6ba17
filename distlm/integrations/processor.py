"""`distlm.KnnLogitsProcessor`: neighbours in Hugging Face's `generate`."""

import torch
from torch import Tensor

from distlm.errors import DistlmError
from distlm.installed import install
from distlm.integrations.knn_lm import KnnLM
from distlm.integrations.mixture import mixed
from distlm.integrations.taps import NewestStates

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

    The hook stands on the model until `close`, or until the processor is gone; it copies B × D numbers a pass.
    """

    def __init__(
        self, knn_lm: KnnLM, lam: float | None = None, temperature: float | None = None, k: int | None = None
    ) -> None:
        """`lam` (λ), `temperature` (T, of squared L2) and `k`: where None those of knn_lm.mixing, and with no `lam`
        its buckets, too (λ by the nearest distance). Raises DistlmError for a KnnLM without an index, UsageError for
        values that cannot be."""
        self._knn = knn_lm
        self.mixing = knn_lm.mixed(lam, temperature, k)
        """λ, temperature and k."""
        self._retriever = knn_lm.retriever
        self._newest = NewestStates(knn_lm.model, knn_lm.tap)

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
        near = self._retriever.search(state.float().cpu().numpy(), self.mixing.k, self.mixing.candidates)
        columns = self._knn.pieces(near.values)
        return mixed(scores, columns, near.shares(self.mixing.temperature), self.mixing.lambdas(near))

    def close(self) -> None:
        """Take the hook off the model."""
        self._newest.close()
