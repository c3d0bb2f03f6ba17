"""Log-probabilities of texts under a language model, its neighbours, and both: whatever the kind of model."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distlm.data.blocks import Blocks, eval_blocks, gather, require_fit
from distlm.data.dictionary import Dictionary
from distlm.datastore.extract import Extracted, batches_of_hidden_states
from distlm.errors import DistlmError, UsageError
from distlm.integrations.gated import TextBefore
from distlm.integrations.mixture import Mixing, mixed
from distlm.integrations.retrieve import Found, Retriever
from distlm.knnlm.generate.growing import Growing
from distlm.knnlm.scoring import Floats, interpolate, knn_log_probs, mix
from distlm.knnlm.search.carried import states_before
from distlm.models.language_model import LanguageModel

Ids = npt.NDArray[np.integer]
ROWS = 128
"""Positions whose probabilities over all words are in memory at once."""


@dataclass(frozen=True)
class TokenLogProbs:
    """Natural logarithm of the probability of each of Q tokens, given those before it."""

    tokens: npt.NDArray[np.int64]
    """int64 [Q]: the tokens; of a KnnLM the tokenizer's ids, the piece that ends a line behind each line."""
    lm: Floats
    """fp64 [Q]: under the language model."""
    knn: Floats | None
    """fp64 [Q]: among the neighbours, −∞ where no neighbour is the token; None without a store."""
    mixture: Floats
    """fp64 [Q]: under λ p_kNN + (1 − λ) p_LM, with p_kNN = 0 where no neighbour is found; `lm` itself without a
    store."""


@dataclass(frozen=True)
class Scorer:
    """A language model over ids of a dictionary and, where there is a store, its neighbours."""

    model: LanguageModel
    tap: str
    """The hidden state that is the key."""
    retriever: Retriever | None
    mixing: Mixing
    longest: int
    """Most tokens of one sequence."""
    carry: bool = False
    """The state of a recurrent model is carried from block to block of a text."""

    def blocks(self, ids: Ids, context_window: int, block: int, batch_blocks: int) -> Iterator[tuple[Extracted, Found]]:
        """Every token of a text, in batches of evaluation blocks (distlm.data.blocks.eval_blocks) with their
        neighbours; needs a store. Raises DistlmError for a text without tokens and blocks that are too long."""
        for batch in self._forward(ids, context_window, block, batch_blocks):
            yield batch, self.near(batch.keys)

    def tokens(self, ids: Ids, context_window: int, block: int, batch_blocks: int) -> TokenLogProbs:
        """Each token of a text, ids int [Q], by the rule of `distlm knn evaluate`. Raises DistlmError as `blocks`.

        λ does not depend on whether a neighbour was found: where none was, the mixture is (1 − λ) p_LM, which over all
        words sums to 1 − λ. `continuations` and `next_word`, whose distributions sum to 1, have p_LM there.
        """
        parts: list[tuple[Floats, Floats, Floats]] = []
        if self.retriever is None:
            found = [of_batch(batch) for batch in self._forward(ids, context_window, block, batch_blocks)]
            of_lm = np.concatenate(found)
            return TokenLogProbs(np.asarray(ids, np.int64), of_lm, None, of_lm)
        gate = self.mixing.gate
        before = None if gate is None else TextBefore(gate.counts)
        for batch, near in self.blocks(ids, context_window, block, batch_blocks):
            targets, of_model = batch.targets.numpy().astype(np.int32), of_batch(batch)
            of_knn = knn_log_probs(near.distances, near.values, targets, self.mixing.temperature)[0]
            if gate is None or before is None:
                mixture = self._mix(near, of_model, of_knn)
            else:
                queries = self.retriever.queries(batch.keys.float().cpu().numpy())
                mixture = mix(of_model, of_knn, gate.lambdas(queries, before.others(of_model, targets)))
            parts.append((of_model, of_knn, mixture))
        lm, knn, mixture = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return TokenLogProbs(np.asarray(ids, np.int64), lm, knn, mixture)

    def continuations(self, pairs: Sequence[tuple[Ids, Ids]], batch: int = 8) -> list[tuple[float, bool]]:
        """(Σ ln p of the second ids after the first, whether each of them is the most probable one) of each pair.

        A text begins after </s>, or what the model has in front of each block, as in evaluation; of a context that is
        too long the last tokens are seen. Where no neighbour is found p is the model's own, as in `next_word`; `tokens`
        has (1 − λ) of it. Raises DistlmError for a continuation that is longer than the model can see.
        """
        results: list[tuple[float, bool]] = []
        for first in range(0, len(pairs), batch):
            results += self._some(pairs[first : first + batch])
        return results

    def near(self, states: Tensor) -> Found:
        """Neighbours of hidden states [n, D]; needs a store."""
        assert self.retriever is not None
        return self.retriever.search(states.float().cpu().numpy(), self.mixing.k, self.mixing.candidates)

    @torch.inference_mode()
    def next_word(self, ids: Ids, text: Growing | None = None) -> Tensor:
        """ln p of every id of the dictionary after the text `ids`: fp32 [V], on the model's device, summing to 1 as p;
        the model's own where no neighbour is found. `text`: what is kept from word to word of one text; None:
        nothing."""
        inputs = [Dictionary.EOS, *np.asarray(ids).tolist()][-self.longest :]
        if self.model.begins:
            inputs[0] = Dictionary.BOS
        output = (text or Growing(self.model)).states(inputs, self.tap)
        assert output.hidden is not None
        return self._scores(output.hidden, output.tapped, torch.tensor([output.hidden.shape[1] - 1]))[0]

    def _some(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """`continuations` in one forward pass."""
        rows, starts = [], []
        for context, continuation in pairs:
            if not len(continuation):
                raise DistlmError("an empty continuation has no probability; give at least one token")
            if len(continuation) > self.longest:
                raise DistlmError(
                    f"a continuation of {len(continuation)} tokens, and the model sees {self.longest}; shorten it"
                )
            seen = np.concatenate([[Dictionary.EOS], context, continuation]).astype(np.int64)[-self.longest - 1 :]
            rows.append(seen)
            starts.append(len(seen) - len(continuation))
        # One stream of tokens; each row is a block that begins behind its first token, which it sees all the same.
        stream = np.concatenate(rows)
        ends = np.cumsum([len(row) for row in rows])
        begins = ends - [len(row) for row in rows]
        blocks = Blocks(begins + 1, begins + np.array(starts), ends)
        with torch.inference_mode():
            made = gather(stream, blocks, np.arange(len(rows)), begins=self.model.begins)
            inputs = torch.from_numpy(made.inputs).to(self._device)
            places = np.flatnonzero(made.scored)
            targets = made.targets.reshape(-1)[places]
            picked, greedy = self._picked(inputs, places, targets)
        bounds = np.cumsum(blocks.scored)[:-1]
        sums = zip(np.split(picked, bounds), np.split(greedy, bounds), strict=True)
        return [(float(scores.sum()), bool(most.all())) for scores, most in sums]

    def _picked(self, inputs: Tensor, places: Ids, targets: Ids) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """ln p of `targets` [n] at the flat `places` [n] of inputs [B, T], and whether each is the most probable."""
        output = self.model(inputs, tap=self.tap)
        scores, greedy = np.empty(len(places)), np.empty(len(places), np.bool_)
        for first in range(0, len(places), ROWS):
            some = slice(first, first + ROWS)
            full = self._scores(output.hidden, output.tapped, torch.from_numpy(places[some]))
            wanted = torch.from_numpy(targets[some]).to(full.device)
            found = full.gather(1, wanted[:, None])[:, 0]
            scores[some] = found.double().cpu().numpy()
            greedy[some] = (found == full.amax(dim=1)).cpu().numpy()
        return scores, greedy

    def _scores(self, hidden: Tensor, tapped: Tensor | None, places: Tensor) -> Tensor:
        """ln p of every id at the flat places [n] of states [B, T, D]: fp32 [n, V]."""
        places = places.to(hidden.device)
        full = self.model.full_log_probs(hidden.flatten(0, 1).index_select(0, places))
        if self.retriever is None or tapped is None or not self.mixing.searches:
            return full
        near = self.near(tapped.flatten(0, 1).index_select(0, places))
        return mixed(full, near.values, near.shares(self.mixing.temperature), self.mixing.lambdas(near))

    def _mix(self, near: Found, of_lm: Floats, of_knn: Floats) -> Floats:
        if self.mixing.buckets is None:
            return interpolate(of_lm, of_knn, self.mixing.lam)
        return mix(of_lm, of_knn, self.mixing.buckets.weights(near.distances[:, 0]))

    def _forward(self, ids: Ids, context_window: int, block: int, batch_blocks: int) -> Iterator[Extracted]:
        if context_window < 0 or block < 1:
            raise UsageError(f"context_window={context_window}, block={block}: at least 0, and at least 1")
        require_fit(context_window, block, self.longest)
        if batch_blocks < 1:
            raise UsageError(f"batch_blocks={batch_blocks}: must be at least 1")
        blocks = eval_blocks(ids, context_window, block)
        before = states_before(self.model, ids, blocks) if self.carry else None
        batches = (np.arange(first, min(first + batch_blocks, len(blocks))) for first in
                   range(0, len(blocks), batch_blocks))  # fmt: skip
        with closing(batches_of_hidden_states(self.model, ids, blocks, batches, self.tap, True, before)) as found:
            yield from found

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def of_batch(batch: Extracted) -> Floats:
    """ln p of the language model: fp64 [n]."""
    assert batch.log_probs is not None
    return batch.log_probs.double().cpu().numpy()
