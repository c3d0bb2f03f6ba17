"""The AWD-LSTM (Merity, Keskar & Socher 2017): LSTM layers, a tied embedding, five kinds of dropout.

Of the dictionary's ids the model has rows for </s>, <unk> and the words: <s> and <pad> never occur in a text. Row i is
id FIRST_ID + i, so a dictionary that is not padded (data.pad_to_multiple=1) gives the published vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError
from distlm.models.awd_lstm.config import LstmConfig
from distlm.models.awd_lstm.lstm import State, WeightDropLstm
from distlm.models.dropout import dropout_mask
from distlm.models.language_model import LanguageModel, LMOutput
from distlm.models.linear_cross_entropy import cross_entropy_sum, target_log_probs

FIRST_ID = Dictionary.EOS
"""Id of the embedding's first row; the ids before it are in no text."""

TAPS: tuple[str, ...] = ("last_output",)
"""Hidden states that a forward pass can return: the output of the last layer, before dropout."""


class Columns(NamedTuple):
    """Which columns of a batch a pass computes: [first, first + B) of `total`. Masks are those of the whole batch."""

    first: int
    total: int


class Streamed(NamedTuple):
    """Outputs of the last layer before (`raw`) and after (`dropped`) its dropout, [T, B, D], and the layers' states."""

    raw: Tensor
    dropped: Tensor
    states: list[State]


class AwdLstm(LanguageModel):
    """Language model over `vocabulary` words of a dictionary; initialised from torch's global random generator.

    Embedding U(−0.1, 0.1), decoder bias 0, LSTM tensors U(−1/√H, 1/√H) with each layer's own H.
    """

    def __init__(self, config: LstmConfig, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.width = config.width
        inner = [config.width, *[config.hidden_width] * (config.layers - 1), config.width]
        self.embedding = nn.Parameter(torch.empty(vocabulary - FIRST_ID, config.width).uniform_(-0.1, 0.1))
        self.decoder_bias = nn.Parameter(torch.zeros(vocabulary - FIRST_ID))
        self.layers = nn.ModuleList(
            WeightDropLstm(inner[i], inner[i + 1], config.weight_dropout) for i in range(config.layers)
        )

    def zero_states(self, rows: int) -> list[State]:
        """States of all layers before the first token."""
        return [layer.zero_state(rows) for layer in self._layers()]

    def stream(self, words: Tensor, states: Sequence[State], columns: Columns | None = None) -> Streamed:
        """words int64 [T, B] that follow those which gave `states` → outputs and the new states.

        In training all masks come from torch's global generator, in the same order and number whatever `columns` is
        (default: the whole batch): passes over parts of a batch from one seed have the masks of one pass over it.
        Embedding and weight masks hold for the whole pass; the locked masks differ by column and hold for all tokens.
        """
        config, columns = self.config, columns or Columns(0, words.shape[1])
        # Padding stands only after the last token that is scored; any row does for it.
        rows = (words - FIRST_ID).clamp_(min=0)
        hidden = F.embedding(rows, self.embedding)
        if self.training and config.embedding_dropout:
            # Only the input's look-up: the tied decoder has the whole matrix.
            kept = dropout_mask((len(self.embedding), 1), config.embedding_dropout, hidden)
            hidden = hidden * kept[rows]
        hidden = self._locked(hidden, config.input_dropout, columns)
        after: list[State] = []
        for number, (layer, state) in enumerate(zip(self._layers(), states, strict=True), 1):
            hidden, state = layer(hidden, state)
            after.append(state)
            if number < config.layers:
                hidden = self._locked(hidden, config.hidden_dropout, columns)
        return Streamed(hidden, self._locked(hidden, config.output_dropout, columns), after)

    @property
    def state_width(self) -> int:  # type: ignore[override]
        """S: h and c of every layer."""
        return sum(2 * layer.width for layer in self._layers())

    def read(self, words: Tensor, before: Tensor) -> Tensor:
        """words int64 [T] after a state fp32 [S] → the state after the last of them, fp32 [S]."""
        states = self.stream(words[:, None], self._unpacked(before[None])).states
        return torch.cat([part[0, 0] for state in states for part in state])

    def forward(
        self, inputs: Tensor, tap: str | None = None, stop_at_tap: bool = False, before: Tensor | None = None
    ) -> LMOutput:
        """inputs int64 [B, T], right-padded, each row from its state `before` fp32 [B, S] (None: the zero state) →
        output before the softmax and the tapped state, both [B, T, D]. With `stop_at_tap` `hidden` is None. Raises
        DistlmError for an unknown tap."""
        if tap is not None and tap not in TAPS:
            raise DistlmError(f"tap={tap!r}: no such hidden state; choose one of {', '.join(TAPS)}")
        if stop_at_tap and tap is None:
            raise ValueError("stop_at_tap needs a tap")
        states = self.zero_states(len(inputs)) if before is None else self._unpacked(before)
        streamed = self.stream(inputs.t(), states)
        tapped = streamed.raw.transpose(0, 1) if tap else None
        return LMOutput(None if stop_at_tap else streamed.dropped.transpose(0, 1), tapped)

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden [T, B, D], targets int64 [T, B] → Σ −ln p(target): fp64 scalar; nothing of size [T·B, V] is made."""
        flat = hidden.reshape(-1, self.width)
        return cross_entropy_sum(flat, self.embedding, self.decoder_bias, targets.reshape(-1) - FIRST_ID)

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden [n, D], targets int64 [n] → log p(target), fp32 [n]; memory as in target_log_probs."""
        return target_log_probs(hidden, self.embedding, self.decoder_bias, targets - FIRST_ID)

    def full_log_probs(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] → log-probabilities of every id, fp32 [n, V]: −∞ for <s> and <pad>."""
        scores = F.log_softmax(F.linear(hidden, self.embedding, self.decoder_bias), dim=1, dtype=torch.float32)
        return F.pad(scores, (FIRST_ID, 0), value=-torch.inf)

    def _layers(self) -> list[WeightDropLstm]:
        return list(self.layers)  # type: ignore[arg-type]

    def _unpacked(self, before: Tensor) -> list[State]:
        """[B, S] → h and c of each layer, [1, B, H]."""
        parts = before[None].split([width for layer in self._layers() for width in (layer.width, layer.width)], dim=2)
        return [(h.contiguous(), c.contiguous()) for h, c in zip(parts[::2], parts[1::2], strict=True)]

    def _locked(self, hidden: Tensor, p: float, columns: Columns) -> Tensor:
        """[T, B, D] with one mask per column for all tokens."""
        if not self.training or p == 0:
            return hidden
        _, rows, width = hidden.shape
        mask = dropout_mask((columns.total, width), p, hidden)
        return hidden * mask[columns.first : columns.first + rows]
