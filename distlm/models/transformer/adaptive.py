"""Adaptive input and tied adaptive softmax (Grave et al. 2017; Baevski & Auli 2019, section 3).

The vocabulary, sorted by frequency, is cut into bands. Band i has embeddings of width D // factor^i and a bias-free
linear to D. Input and softmax share the embeddings of every band and the projections of the tail bands (i ≥ 1).
The shared parameters are registered in both modules, because ZeRO-3 gathers a module's own parameters, and only
those, when that module's forward is called.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlm.data.dictionary import Dictionary
from distlm.errors import UsageError
from distlm.models.linear_cross_entropy import linear_log_probs
from distlm.models.row_dropout import Noise


@dataclass(frozen=True)
class Bands:
    """Band i holds the words edges[i] … edges[i+1] − 1 with embeddings of widths[i]."""

    edges: tuple[int, ...]
    widths: tuple[int, ...]

    @staticmethod
    def plan(vocabulary: int, cutoffs: Sequence[int], width: int, factor: int) -> "Bands":
        """Bands of a vocabulary; cutoffs at or above its size are dropped.

        Raises DistlmError when a band's embedding would have no width left.
        """
        edges = (0, *(edge for edge in cutoffs if edge < vocabulary), vocabulary)
        widths = tuple(width // factor**band for band in range(len(edges) - 1))
        if widths[-1] < 1:
            raise UsageError(
                f"model.cutoffs={list(cutoffs)} with model.factor={factor}: band {len(widths) - 1} of a model of width "
                f"{width} would have embeddings of width 0; use fewer cutoffs or a smaller factor"
            )
        return Bands(edges, widths)

    def __len__(self) -> int:
        return len(self.widths)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Words in each band."""
        return tuple(after - before for before, after in pairwise(self.edges))

    def rows(self, ids: Tensor) -> list[Tensor]:
        """For each band, the positions (int64) in `ids` [n] whose word lies in it; together a permutation of 0..n−1.

        The outer bands are open, so that an id outside the vocabulary fails at the look-up, not silently.
        """
        if len(self) == 1:
            return [torch.arange(ids.numel(), device=ids.device)]
        band = torch.bucketize(ids, torch.tensor(self.edges[1:-1], device=ids.device), right=True)
        return [torch.nonzero(band == i).squeeze(1) for i in range(len(self))]


class AdaptiveInput(nn.Module):
    """Word ids → vectors of width D. Parameters `embedding_i` [words_i, D_i] and `projection_i` [D, D_i]."""

    def __init__(self, bands: Bands, width: int) -> None:
        super().__init__()
        self.bands = bands
        self.width = width
        for i, (words, inner) in enumerate(zip(bands.sizes, bands.widths, strict=True)):
            self.register_parameter(f"embedding_{i}", nn.Parameter(torch.empty(words, inner)))
            self.register_parameter(f"projection_{i}", nn.Parameter(torch.empty(width, inner)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings N(0, D_i^-½) with a zero padding row, projections Xavier uniform."""
        for i, inner in enumerate(self.bands.widths):
            nn.init.normal_(self.embedding(i), std=inner**-0.5)
            nn.init.xavier_uniform_(self.projection(i))
        with torch.no_grad():
            self.embedding(0)[Dictionary.PAD].zero_()

    def embedding(self, band: int) -> nn.Parameter:
        """Embeddings of a band, [words_i, D_i]."""
        return self.get_parameter(f"embedding_{band}")

    def projection(self, band: int) -> nn.Parameter:
        """Projection of a band, [D, D_i]."""
        return self.get_parameter(f"projection_{band}")

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T] → [B, T, D]. The padding word gives no gradient to its embedding."""
        flat = ids.reshape(-1)
        rows = self.bands.rows(flat)
        # A band without words is still looked up (with no rows): every parameter must get a gradient in every
        # backward pass, or ZeRO waits for it.
        parts = [
            F.linear(
                F.embedding(
                    flat[rows[i]] - self.bands.edges[i],
                    self.embedding(i),
                    padding_idx=Dictionary.PAD if i == 0 else None,
                ),
                self.projection(i),
            )
            for i in range(len(rows))
        ]
        if len(parts) == 1:
            return parts[0].view(*ids.shape, self.width)
        order = torch.cat(rows)
        places = torch.empty_like(order)
        places[order] = torch.arange(order.numel(), device=order.device)
        return torch.cat(parts).index_select(0, places).view(*ids.shape, self.width)


class AdaptiveSoftmax(nn.Module):
    """Vectors of width D → log-probabilities of words, through the parameters of an AdaptiveInput.

    The head scores the words of band 0 and one class per tail band (`class_weight` [tails, D], its own parameter);
    a word of tail band i has the log-probability of its class plus its log-probability within the band.
    """

    def __init__(self, tied: AdaptiveInput, dropout: float, noise: Noise | None = None) -> None:
        super().__init__()
        self.noise = noise or Noise()
        self.bands = tied.bands
        self.tails = len(self.bands) - 1
        self.dropout = dropout
        for i in range(len(self.bands)):
            self.register_parameter(f"embedding_{i}", tied.embedding(i))
        for i in range(1, len(self.bands)):
            self.register_parameter(f"projection_{i}", tied.projection(i))
        if self.tails:
            self.class_weight = nn.Parameter(torch.empty(self.tails, tied.width))
            nn.init.xavier_uniform_(self.class_weight)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden [n, D], targets int64 [n] → log p(target), fp32 [n].

        Memory: the head's logits and their fp32 log-softmax, both [n, words of band 0 + tails] (20,002 wide in the
        WikiText-103 recipe), and for each tail [rows whose target lies in it, words of the band]; backward needs as
        much again (by the kernel less: see linear_log_probs). Nothing of size [n, V] is made.
        """
        hidden = self.noise.of_tokens(hidden, self.dropout, self.training, "hidden")
        rows = self.bands.rows(targets)
        head_targets = targets
        for i in range(1, len(rows)):
            head_targets = head_targets.index_fill(0, rows[i], self.bands.edges[1] + i - 1)
        log_probs = linear_log_probs(hidden, self._head_weight(), head_targets)
        for i in range(1, len(rows)):
            # No rows, no special case: zero-row products give the band's parameters the zero gradient ZeRO waits for.
            inner = self._inner(i, hidden.index_select(0, rows[i]), rows[i])
            within = linear_log_probs(
                inner, self.get_parameter(f"embedding_{i}"), targets[rows[i]] - self.bands.edges[i]
            )
            log_probs = log_probs.index_add(0, rows[i], within)
        return log_probs

    def full_log_probs(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] → log-probabilities of every word, fp32 [n, V]. For tests and small vocabularies.

        Not under ZeRO-3: it is no forward, so the parameters are not gathered for it.
        """
        head = torch.log_softmax(self._head_logits(hidden), dim=1, dtype=torch.float32)
        parts = [head[:, : self.bands.edges[1]]]
        for i in range(1, len(self.bands)):
            within = torch.log_softmax(self._tail_logits(i, hidden), dim=1, dtype=torch.float32)
            parts.append(within + head[:, self.bands.edges[1] + i - 1, None])
        return torch.cat(parts, dim=1)

    def _head_logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self._head_weight())

    def _tail_logits(self, band: int, hidden: Tensor) -> Tensor:
        return F.linear(self._inner(band, hidden), self.get_parameter(f"embedding_{band}"))

    def _head_weight(self) -> Tensor:
        weight = self.get_parameter("embedding_0")
        return torch.cat([weight, self.class_weight]) if self.tails else weight

    def _inner(self, band: int, hidden: Tensor, chosen: Tensor | None = None) -> Tensor:
        """[n, D_band] of the tokens that `chosen` names among the scored ones; None: all."""
        inner = hidden @ self.get_parameter(f"projection_{band}")
        return self.noise.of_tokens(inner, self.dropout, self.training, f"band.{band}", chosen)
