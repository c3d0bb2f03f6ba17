"""Logits of a model of Hugging Face from its last hidden states.

Most models end in a softmax layer over the last hidden state. Some scale its output (Cohere, Granite), cap it (Gemma 2)
or project the state before it. What each does stands in the forward of its class and nowhere else, so for those it is
that forward that runs, with a stub in place of the layers, which hands it the hidden states. No list of models.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

_PROBES = (1.0, 100.0)
"""Sizes of the states that are tried: a cap shows at large logits alone."""


def logits_of(hf: Any) -> nn.Module:
    """hidden [n, D] → logits [n, rows]: the softmax layer where the model's own forward gives the same, else that
    forward. Parameters stay the model's. Raises ValueError where neither can be had."""
    head, own = hf.get_output_embeddings(), OwnLogits(hf)
    if head is None:
        raise ValueError("it has no softmax layer")
    weight = head.weight
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        probes = [size * torch.randn(2, weight.shape[1], generator=draw).to(weight) for size in _PROBES]
        plain = all(torch.allclose(head(probe), own(probe), rtol=1e-4, atol=1e-4) for probe in probes)
    return head if plain else own


class OwnLogits(nn.Module):
    """The end of a model's forward: what it makes of the output of its layers."""

    def __init__(self, hf: Any) -> None:
        super().__init__()
        # A shallow copy with other modules: the softmax layer and its parameters are the model's own.
        end = copy.copy(hf)
        end._modules = dict(hf._modules)
        end._modules[hf.base_model_prefix] = _Given()
        # Not a submodule: its parameters must not be counted twice.
        self._end = [end]

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] → logits [n, rows]. Memory: both, and what the model makes of the logits on its way."""
        logits: Tensor = self._end[0](inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits


class _Given(nn.Module):
    """Stands for the layers: its input is their output."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        return _Output(last_hidden_state=inputs_embeds)


@dataclass
class _Output(BaseModelOutputWithPast):
    """What layers give, and None for whatever else a model looks for (of experts, say)."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return None
