"""Where a memory stands in a layer of BERT, RoBERTa or DistilBERT: LN(x + α·FFN(x) + β·PKM(x)).

Kim & Jung, section 3.1: (α, β) is (1, 0) without memory, (0, 1) with PKM in the FFN's place, (1, 1) for ResM. On torch
alone: `distlm export hf` copies it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Given = Callable[[], tuple[Any, ...]]
"""What a memory is given beside x."""


class MemoryOutput(nn.Module):
    """The end of a BERT or RoBERTa layer with a memory: LN(x + α·FFN(x) + β·PKM(x))."""

    def __init__(self, output: Any, memory: nn.Module, alpha: float, beta: float, given: Given, ffn: bool) -> None:
        super().__init__()
        self.dense: nn.Module | None = output.dense if ffn else None
        self.dropout: nn.Module | None = output.dropout if ffn else None
        self.LayerNorm, self.memory = output.LayerNorm, memory
        self.alpha, self.beta, self.given = alpha, beta, given

    def forward(self, inner: Tensor, x: Tensor) -> Tensor:
        """inner [B, T, ffn width] of this layer's FFN, x [B, T, D] the attention's output → [B, T, D]."""
        total = x
        if self.dense is not None and self.dropout is not None:
            total = self.alpha * self.dropout(self.dense(inner)) + total
        # Last, so that a memory of zeros leaves the dense model's bits.
        total = total + self.beta * self.memory(x, *self.given())
        normed: Tensor = self.LayerNorm(total)
        return normed


class MemoryFfn(nn.Module):
    """DistilBERT's feed-forward network with a memory: α·FFN(x) + β·PKM(x); the block adds x and normalises."""

    def __init__(self, ffn: Any, memory: nn.Module, alpha: float, beta: float, given: Given, keep: bool) -> None:
        super().__init__()
        self.keep = keep
        if keep:
            self.lin1, self.activation, self.lin2, self.dropout = ffn.lin1, ffn.activation, ffn.lin2, ffn.dropout
        self.memory, self.alpha, self.beta, self.given = memory, alpha, beta, given

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] → the same shape."""
        read: Tensor = self.beta * self.memory(x, *self.given())
        if not self.keep:
            return read
        return self.alpha * self.dropout(self.lin2(self.activation(self.lin1(x)))) + read


def layers_of(hf: Any) -> nn.ModuleList:
    """The layers of an encoder of Hugging Face, whatever its head."""
    base = hf.base_model
    layers: nn.ModuleList = base.transformer.layer if hasattr(base, "transformer") else base.encoder.layer
    return layers


def add_memory(layer: Any, memory: nn.Module, settings: Mapping[str, Any], given: Given) -> None:
    """Give a layer its memory, by `settings`: kind (pkm: in place of the FFN, resm: beside it), alpha, beta.

    In each forward pass the memory is called with x [B, T, D] and what `given` returns.
    """
    resm = settings["kind"] == "resm"
    if hasattr(layer, "ffn"):
        layer.ffn = MemoryFfn(layer.ffn, memory, settings["alpha"], settings["beta"], given, resm)
        return
    layer.output = MemoryOutput(layer.output, memory, settings["alpha"], settings["beta"], given, resm)
    if not resm:
        layer.intermediate = nn.Identity()
