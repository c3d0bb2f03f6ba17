"""One LSTM layer with DropConnect on its hidden-to-hidden weights (Merity et al. 2017, section 2)."""

import math
import warnings

import torch
from torch import Tensor, nn

from distlm.models.dropout import dropout

State = tuple[Tensor, Tensor]
"""h and c of one layer after a token, each [1, B, H]."""

# The dropped weights are a new tensor in every step, so cuDNN packs them anew: 4 bytes per weight, once per step.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")


class WeightDropLstm(nn.Module):
    """LSTM layer I → H in torch's layout: gates i, f, g, o; weights [4H, I] and [4H, H], two biases [4H].

    The parameters are the undropped weights and nothing else. The step's weights are handed to torch's LSTM as
    arguments (CPU and cuDNN alike), so no module can go on using a stale copy of them.
    """

    def __init__(self, inputs: int, width: int, weight_dropout: float) -> None:
        super().__init__()
        self.inputs, self.width, self.weight_dropout = inputs, width, weight_dropout
        self.weight_ih = nn.Parameter(torch.empty(4 * width, inputs))
        self.weight_hh = nn.Parameter(torch.empty(4 * width, width))
        self.bias_ih = nn.Parameter(torch.empty(4 * width))
        self.bias_hh = nn.Parameter(torch.empty(4 * width))
        bound = 1 / math.sqrt(width)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, hidden: Tensor, state: State) -> tuple[Tensor, State]:
        """hidden [T, B, I], state after the token before → outputs [T, B, H] and the state after the last token.

        In training one mask is drawn from torch's global generator: the same for all tokens and rows of the call.
        """
        dropped = dropout(self.weight_hh, self.weight_dropout, self.training)
        weights = [self.weight_ih, dropped, self.bias_ih, self.bias_hh]
        # has_biases, layers, dropout, train, bidirectional, batch_first
        output, h, c = torch._VF.lstm(hidden, list(state), weights, True, 1, 0.0, self.training, False, False)
        return output, (h, c)

    def zero_state(self, rows: int) -> State:
        """State before the first token of `rows` rows."""
        zero = self.weight_hh.new_zeros(1, rows, self.width)
        return zero, zero
