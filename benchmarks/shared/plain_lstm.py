"""The AWD-LSTM of Merity et al. (2017) as one writes it in plain torch, to compare steps with; two ways."""

import warnings
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlm.models.awd_lstm.config import LstmConfig
from distlm.models.awd_lstm.model import AwdLstm

State = tuple[Tensor, Tensor]


class PlainLstm(nn.Module):
    """The best that one writes without a framework: the mask of words is looked up beside their embeddings, and torch's
    LSTM is given the step's weights as arguments. Ids count from 0."""

    def __init__(self, config: LstmConfig, vocabulary: int, ours: AwdLstm | None = None) -> None:
        """ours: distlm's model, whose weights are taken."""
        super().__init__()
        self.config = config
        widths = [config.width, *[config.hidden_width] * (config.layers - 1), config.width]
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.layers = nn.ModuleList(nn.LSTM(before, after) for before, after in pairwise(widths))
        self.decoder = nn.Linear(config.width, vocabulary)
        self.decoder.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        if ours is not None:
            self._take(ours)

    @torch.no_grad()
    def _take(self, ours: AwdLstm) -> None:
        self.embedding.weight.copy_(ours.embedding)
        self.decoder.bias.copy_(ours.decoder_bias)
        layers: Any = zip(self.layers, ours.layers, strict=True)
        for mine, theirs in layers:
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(mine, f"{name}_l0").copy_(getattr(theirs, name))

    def zero_states(self, rows: int) -> list[State]:
        """States [1, B, H] of all layers before the first token."""
        layers: Any = self.layers
        zeros = [self.embedding.weight.new_zeros(1, rows, layer.hidden_size) for layer in layers]
        return [(zero, zero) for zero in zeros]

    def forward(self, words: Tensor, states: list[State]) -> tuple[Tensor, Tensor, Tensor, list[State]]:
        """words int64 [T, B] → scores [T·B, V], outputs of the last layer before and after its dropout [T, B, D], and
        the detached states after the last word."""
        config = self.config
        hidden = self._locked(self._embedded(words), config.input_dropout)
        after: list[State] = []
        for number, state in enumerate(states):
            hidden, (h, c) = self._layer(number, hidden, state)
            after.append((h.detach(), c.detach()))
            raw = hidden
            last = number == config.layers - 1
            hidden = self._locked(hidden, config.output_dropout if last else config.hidden_dropout)
        return self.decoder(hidden.flatten(0, 1)), raw, hidden, after

    def _embedded(self, words: Tensor) -> Tensor:
        return self.embedding(words) * self._kept_words()[words]

    def _layer(self, number: int, hidden: Tensor, state: State) -> tuple[Tensor, State]:
        layer: Any = self.layers[number]
        dropped = F.dropout(layer.weight_hh_l0, self.config.weight_dropout, self.training)
        weights = [layer.weight_ih_l0, dropped, layer.bias_ih_l0, layer.bias_hh_l0]
        out, h, c = torch.lstm(hidden, state, weights, True, 1, 0.0, self.training, False, False)
        return out, (h, c)

    def _kept_words(self) -> Tensor:
        """[V, 1]: 0 for a dropped word."""
        weight, p = self.embedding.weight, self.config.embedding_dropout if self.training else 0.0
        return weight.new_empty(len(weight), 1).bernoulli_(1 - p) / (1 - p)

    def _locked(self, hidden: Tensor, p: float) -> Tensor:
        if not self.training:
            return hidden
        return hidden * (hidden.new_empty(1, *hidden.shape[1:]).bernoulli_(1 - p) / (1 - p))


class UsualLstm(PlainLstm):
    """As ports of the authors' code have it: a masked copy of the embedding matrix, and LSTM layers whose weight_hh_l0
    is replaced by a dropped tensor in every forward."""

    def __init__(self, config: LstmConfig, vocabulary: int, ours: AwdLstm | None = None) -> None:
        super().__init__(config, vocabulary, ours)
        warnings.filterwarnings("ignore", message="RNN module weights")
        self.raw = nn.ParameterList()
        layers: Any = self.layers
        for layer in layers:
            self.raw.append(nn.Parameter(layer.weight_hh_l0.detach().clone()))
            del layer._parameters["weight_hh_l0"]
            layer.flatten_parameters = lambda: None

    def _embedded(self, words: Tensor) -> Tensor:
        return F.embedding(words, self.embedding.weight * self._kept_words())

    def _layer(self, number: int, hidden: Tensor, state: State) -> tuple[Tensor, State]:
        layer: Any = self.layers[number]
        dropped = F.dropout(self.raw[number], self.config.weight_dropout, self.training)
        # Where nothing is dropped that is the parameter itself, which the layer would keep as one of its own.
        layer.weight_hh_l0 = dropped.clone() if isinstance(dropped, nn.Parameter) else dropped
        out: tuple[Tensor, State] = layer(hidden, state)
        return out
