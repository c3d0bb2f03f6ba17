"""The model of Baevski and Auli (2019) as one writes it in plain torch, to compare tokens a second with."""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlm.models.transformer.config import TransformerConfig
from distlm.models.transformer.model import TransformerLM


class Layer(nn.Module):
    """Pre-norm self-attention and a feed-forward network with ReLU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.inner = nn.Linear(config.width, config.ffn_width)
        self.outer = nn.Linear(config.ffn_width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        config, (rows, tokens, width) = self.config, hidden.shape
        heads = self.qkv(self.norms[0](hidden)).view(rows, tokens, 3, config.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        mixed = F.scaled_dot_product_attention(
            query, key, value, dropout_p=config.attention_dropout if self.training else 0.0, is_causal=True
        )
        mixed = self.out(mixed.transpose(1, 2).reshape(rows, tokens, width))
        hidden = hidden + F.dropout(mixed, config.dropout, self.training)
        inner = F.dropout(F.relu(self.inner(self.norms[1](hidden))), config.activation_dropout, self.training)
        return hidden + F.dropout(self.outer(inner), config.dropout, self.training)


class PlainLM(nn.Module):
    """Adaptive input, layers, adaptive softmax tied to the input; sinusoidal positions."""

    def __init__(self, config: TransformerConfig, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.edges = [0, *(edge for edge in config.cutoffs if edge < vocabulary), vocabulary]
        widths = [config.width // config.factor**band for band in range(len(self.edges) - 1)]
        sizes = [high - low for low, high in pairwise(self.edges)]
        self.words = nn.ParameterList(
            torch.randn(size, width) * width**-0.5 for size, width in zip(sizes, widths, strict=True)
        )
        self.projections = nn.ParameterList(torch.empty(config.width, width) for width in widths)
        for projection in self.projections:
            nn.init.xavier_uniform_(projection)
        self.classes = nn.Parameter(torch.randn(len(sizes) - 1, config.width) * config.width**-0.5)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        rates = torch.exp(torch.arange(config.width // 2) * -(math.log(10000) / (config.width // 2 - 1)))
        # fairseq counts them from 2.
        angles = torch.arange(2, config.max_positions + 2)[:, None] * rates
        self.positions: Tensor
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], 1), persistent=False)

    @torch.no_grad()
    def take(self, ours: TransformerLM) -> None:
        """The weights of distlm's model of the same configuration and vocabulary."""
        for band, (words, projection) in enumerate(zip(self.words, self.projections, strict=True)):
            words.copy_(ours.embedding.embedding(band))
            projection.copy_(ours.embedding.projection(band))
        self.classes.copy_(ours.softmax.class_weight)
        layers: Any = zip(self.layers, ours.layers, strict=True)
        for mine, theirs in layers:
            pairs = [
                (mine.norms[0], theirs.attention_norm), (mine.norms[1], theirs.ffn_norm),
                (mine.qkv, theirs.attention.qkv), (mine.out, theirs.attention.out), (mine.inner, theirs.fc1),
                (mine.outer, theirs.fc2),
            ]  # fmt: skip
            for copy, original in pairs:
                copy.load_state_dict(original.state_dict())

    def forward(self, ids: Tensor, targets: Tensor, scored: Tensor | None = None) -> Tensor:
        """ids and targets int64 [B, T] → mean nats per token, of those that are `scored` (bool [B, T]; None: all)."""
        config = self.config
        hidden = self.positions[: ids.shape[1]] + math.sqrt(config.width) * self._embedded(ids)
        hidden = F.dropout(hidden, config.dropout, self.training)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden, targets = (part.flatten(0, 1) if scored is None else part[scored] for part in (hidden, targets))
        return self._loss(F.dropout(hidden, config.softmax_dropout, self.training), targets)

    def _embedded(self, ids: Tensor) -> Tensor:
        embedded: Tensor | None = None
        for low, high, words, projection in self._bands():
            chosen = (ids >= low) & (ids < high)
            part = F.linear(F.embedding(ids[chosen] - low, words), projection)
            if embedded is None:
                embedded = part.new_zeros(*ids.shape, self.config.width)
            embedded[chosen] = part
        assert embedded is not None
        return embedded

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        (_, first, words, _), *tails = self._bands()
        total = hidden.new_zeros((), dtype=torch.float32)
        head_targets = targets
        for number, (low, high, within, projection) in enumerate(tails):
            chosen = ((targets >= low) & (targets < high)).nonzero().squeeze(1)
            head_targets = head_targets.index_fill(0, chosen, first + number)
            inner = F.dropout(hidden[chosen] @ projection, self.config.softmax_dropout, self.training)
            scores = F.linear(inner, within).float()
            total = total + F.cross_entropy(scores, targets[chosen] - low, reduction="sum")
        scores = F.linear(hidden, torch.cat([words, self.classes])).float()
        return (total + F.cross_entropy(scores, head_targets, reduction="sum")) / len(targets)

    def _bands(self) -> list[tuple[int, int, Tensor, Tensor]]:
        """First word and the one behind the last, embeddings [words, D_i], projection [D, D_i], of each band."""
        edges = pairwise(self.edges)
        return [
            (low, high, words, projection)
            for (low, high), words, projection in zip(edges, self.words, self.projections, strict=True)
        ]
