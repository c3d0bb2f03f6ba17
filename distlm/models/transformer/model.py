"""The transformer language model of Baevski & Auli (2019), as fairseq's `transformer_lm_wiki103`.

Pre-norm decoder layers without a final layer norm, ReLU feed-forward, sinusoidal positions, adaptive input and tied
adaptive softmax. At chosen layers a product-key memory stands in the feed-forward network's place (Lample et al. 2019)
or beside it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError, UsageError
from distlm.memory.config import MemoryConfig
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.of_model import make_memories
from distlm.memory.placing import require_layers
from distlm.memory.values.exchange import Exchange
from distlm.models.dropout import causal_attention
from distlm.models.language_model import LanguageModel, LMOutput
from distlm.models.row_dropout import Noise, Rows, memory_dropout
from distlm.models.transformer.adaptive import AdaptiveInput, AdaptiveSoftmax, Bands
from distlm.models.transformer.config import TransformerConfig, TransformerModel

TAPS: tuple[str, ...] = (
    "last_attention_residual",
    "last_attention_input",
    "last_ffn_residual",
    "last_ffn_input",
    "output",
)
"""Hidden states of the last layer that a forward pass can return, in the order they are computed: the input of its
self-attention before and after layer norm, the input of its feed-forward before and after layer norm (the latter is
the key of kNN-LM, Khandelwal et al. section 5), and the model's output before the softmax."""


@lru_cache(maxsize=8)
def sinusoidal_positions(length: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Position vectors [length, width] of token 0, 1, …; computed in fp32, then cast.

    Vaswani et al. section 3.5 in tensor2tensor's layout: sines in the first half, cosines in the second, wave lengths
    spaced over half − 1. Token t has position index t + 2, as in fairseq, which counts from the padding id + 1.
    """
    half = width // 2
    # Cached, so it must not be an inference tensor: a later training pass may use it.
    with torch.inference_mode(False), torch.no_grad():
        rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / max(half - 1, 1)))
        first = Dictionary.PAD + 1
        angles = torch.arange(first, first + length, dtype=torch.float32)[:, None] * rates
        table = torch.cat([angles.sin(), angles.cos(), angles.new_zeros(length, width % 2)], dim=1)
        return table.to(device, dtype)


class SelfAttention(nn.Module):
    """Causal multi-head self-attention; q, k and v in one product."""

    def __init__(self, width: int, heads: int, dropout: float, noise: Noise) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.drop = None if noise.rows is None else partial(noise, p=dropout, training=True, place="attention")
        # The bias of q, k and v keeps nn.Linear's own initialisation, as in fairseq.
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        for part in self.qkv.weight.detach().chunk(3):
            nn.init.xavier_uniform_(part, gain=1 / math.sqrt(2))
        _xavier(self.out)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]; token t attends to tokens 0..t, so right padding needs no mask."""
        rows, tokens, width = hidden.shape
        q, k, v = self.qkv(hidden).view(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = causal_attention(q, k, v, self.dropout if self.training else 0.0, self.drop)
        return self.out(mixed.transpose(1, 2).reshape(rows, tokens, width))


class DecoderLayer(nn.Module):
    """Pre-norm layer: hidden + attention(norm(hidden)), then hidden + α·ffn(norm(hidden)) + β·memory(norm(hidden)),
    where there is an ffn (α) and a memory (β)."""

    def __init__(self, config: TransformerConfig, noise: Noise) -> None:
        super().__init__()
        self.noise = noise
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config.width, config.heads, config.attention_dropout, noise)
        self.ffn_norm = nn.LayerNorm(config.width)
        self.fc1 = _xavier(nn.Linear(config.width, config.ffn_width))
        self.fc2 = _xavier(nn.Linear(config.ffn_width, config.width))
        self.memory: nn.Module | None = None
        self.ffn, self.alpha, self.beta = True, 1.0, 1.0
        self.given: Callable[[], tuple[Any, ...]] = tuple

    def add_memory(self, memory: nn.Module, settings: Mapping[str, Any], given: Callable[[], tuple[Any, ...]]) -> None:
        """Put it in the feed-forward network's place or beside it, by `settings`: kind (pkm, resm), alpha, beta. In
        each forward pass it is called with its input [B, T, D] and what `given` returns."""
        self.memory, self.alpha, self.beta, self.given = memory, settings["alpha"], settings["beta"], given
        if settings["kind"] == "pkm":
            del self.fc1, self.fc2
            self.ffn = False

    def states(self, hidden: Tensor) -> Iterator[Tensor]:
        """The five states [B, T, D] of TAPS, each computed only when asked for."""
        yield hidden
        normed = self.attention_norm(hidden)
        yield normed
        hidden = hidden + self.noise(self.attention(normed), self.dropout, self.training, "residual")
        yield hidden
        normed = self.ffn_norm(hidden)
        yield normed
        yield self._output(hidden, normed)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        *_, hidden = self.states(hidden)
        return hidden

    def _output(self, hidden: Tensor, normed: Tensor) -> Tensor:
        if self.ffn:
            inner = self.noise(F.relu(self.fc1(normed), inplace=True), self.activation_dropout, self.training, "inner")
            outer = self.noise(self.fc2(inner), self.dropout, self.training, "ffn")
            hidden = hidden + (outer if self.memory is None else self.alpha * outer)
        if self.memory is not None:
            # Last, so that a memory of zeros leaves the dense model's bits.
            hidden = hidden + self.beta * self.memory(normed, *self.given())
        return hidden


class TransformerLM(LanguageModel):
    """Language model over `vocabulary` words; initialised from torch's global random generator.

    With a memory dropout belongs to rows: in training it is called within `rows.set`. Raises DistlmError when width and
    heads, cutoffs and factor, or positions and layers, do not fit.
    """

    def __init__(self, config: TransformerConfig, vocabulary: int, exchange: Exchange | None = None) -> None:
        """`exchange` joins the ranks that train its memories; None: this process has all of them."""
        super().__init__()
        if config.width % config.heads:
            raise UsageError(f"model.width={config.width}: must be a multiple of model.heads={config.heads}")
        self.config = config
        self.vocabulary = vocabulary
        self.width = config.width
        bands = Bands.plan(vocabulary, config.cutoffs, config.width, config.factor)
        self.embedding = AdaptiveInput(bands, config.width)
        self.rows = rows_for(config)
        self.noise = Noise(self.rows, "embedding")
        layers = [DecoderLayer(config, Noise(self.rows, f"layer.{n}")) for n in range(1, config.layers + 1)]
        self.layers = nn.ModuleList(layers)
        self.softmax = AdaptiveSoftmax(self.embedding, config.softmax_dropout, Noise(self.rows, "softmax"))
        self.memories: dict[int, ProductKeyMemory] = {}
        """Layer, counted from 1 → its memory; the modules themselves hang in the layers."""
        self.ffn_names = {n: (f"layers.{n - 1}.fc1.", f"layers.{n - 1}.fc2.") for n in range(1, config.layers + 1)}
        """Layer → how the names of its feed-forward network's parameters begin."""
        if getattr(config, "memory", None):
            # After the dense weights: those do not depend on the memory.
            self.memories = equip(layers, config, self.rows, exchange)

    def forward(self, inputs: Tensor, tap: str | None = None, stop_at_tap: bool = False) -> LMOutput:
        """inputs int64 [B, T], right-padded → output before the softmax and the tapped state, both [B, T, D].

        With `stop_at_tap` nothing after the tap is computed and `hidden` is None.
        Raises DistlmError for an unknown tap and for T > model.max_positions.
        """
        if tap is not None and tap not in TAPS:
            raise DistlmError(f"tap={tap!r}: no such hidden state; choose one of {', '.join(TAPS)}")
        if stop_at_tap and tap is None:
            raise ValueError("stop_at_tap needs a tap")
        tokens = inputs.shape[1]
        if tokens > self.config.max_positions:
            raise DistlmError(
                f"a sequence of {tokens} tokens is longer than model.max_positions={self.config.max_positions}; "
                "shorten the context window or the block"
            )
        hidden = self._embed(inputs)
        *before, last = self.layers
        for layer in before:
            hidden = layer(hidden)
        tapped = None
        for name, state in zip(TAPS, cast(DecoderLayer, last).states(hidden), strict=True):
            if name == tap:
                tapped = state
                if stop_at_tap:
                    return LMOutput(None, tapped)
            hidden = state
        return LMOutput(hidden, tapped)

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden [n, D], targets int64 [n] → log p(target), fp32 [n]; memory as in AdaptiveSoftmax.forward."""
        return self.softmax(hidden, targets)

    def full_log_probs(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] → log-probabilities of every word, fp32 [n, V]; for tests and small vocabularies."""
        return self.softmax.full_log_probs(hidden)

    def _embed(self, inputs: Tensor) -> Tensor:
        embedded = self.embedding(inputs)
        positions = sinusoidal_positions(inputs.shape[1], self.width, embedded.dtype, embedded.device)
        hidden = torch.add(positions, embedded, alpha=math.sqrt(self.width))
        return self.noise(hidden, self.config.dropout, self.training, "hidden")


def rows_for(config: TransformerConfig) -> Rows | None:
    """What a model with memory must know of its rows."""
    return Rows() if isinstance(config, TransformerModel) and config.memory else None


def equip(
    layers: Sequence[DecoderLayer], config: TransformerConfig, rows: Rows | None, exchange: Exchange | None
) -> dict[int, ProductKeyMemory]:
    """Give the layers that config.memory names fresh memories: layer, counted from 1 → its memory."""
    assert isinstance(config, TransformerModel) and rows is not None
    settings = MemoryConfig(**config.memory)
    require_layers(settings.positions, len(layers))
    made = make_memories(settings, config.width, config.seed, exchange, partial(memory_dropout, rows))
    for position, memory in made.items():
        layers[position - 1].add_memory(memory, asdict(settings), rows.of_text)
    return made


def _xavier(linear: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
