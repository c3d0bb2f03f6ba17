"""The model of Baevski & Auli written a second time, slowly: one word, one position and one head at a time."""

import math

import torch
from torch import Tensor

from distlm.models.transformer.config import TransformerConfig

Weights = dict[str, Tensor]


def position_vector(index: int, width: int) -> Tensor:
    half = width // 2
    rates = [10000 ** (-i / (half - 1)) for i in range(half)]
    return torch.tensor([math.sin(index * rate) for rate in rates] + [math.cos(index * rate) for rate in rates])


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.pow(2).mean() + 1e-5).sqrt() * weight + bias


def band_of(word: int, edges: list[int]) -> int:
    return max(i for i, edge in enumerate(edges[:-1]) if word >= edge)


def states(weights: Weights, config: TransformerConfig, edges: list[int], words: list[int]) -> dict[str, Tensor]:
    """Taps of the last layer, each [T, D], for one row of input words."""
    w, width = weights, config.width
    rows = []
    for t, word in enumerate(words):
        band = band_of(word, edges)
        embedding = w[f"embedding.embedding_{band}"][word - edges[band]]
        rows.append(w[f"embedding.projection_{band}"] @ embedding * math.sqrt(width) + position_vector(t + 2, width))
    x = torch.stack(rows)
    taps = {}
    for layer in range(config.layers):
        name = f"layers.{layer}."
        taps["last_attention_residual"] = x
        normed = torch.stack(
            [layer_norm(r, w[name + "attention_norm.weight"], w[name + "attention_norm.bias"]) for r in x]
        )
        taps["last_attention_input"] = normed
        q, k, v = (normed @ w[name + "attention.qkv.weight"].T + w[name + "attention.qkv.bias"]).split(width, dim=1)
        size = width // config.heads
        mixed = torch.zeros_like(x)
        for head in range(config.heads):
            part = slice(head * size, (head + 1) * size)
            for t in range(len(words)):
                scores = torch.stack([q[t, part] @ k[s, part] / math.sqrt(size) for s in range(t + 1)])
                mixed[t, part] = scores.softmax(0) @ v[: t + 1, part]
        x = x + mixed @ w[name + "attention.out.weight"].T + w[name + "attention.out.bias"]
        taps["last_ffn_residual"] = x
        normed = torch.stack([layer_norm(r, w[name + "ffn_norm.weight"], w[name + "ffn_norm.bias"]) for r in x])
        taps["last_ffn_input"] = normed
        inner = (normed @ w[name + "fc1.weight"].T + w[name + "fc1.bias"]).clamp(min=0)
        x = x + inner @ w[name + "fc2.weight"].T + w[name + "fc2.bias"]
    taps["output"] = x
    return taps


def log_prob(weights: Weights, edges: list[int], hidden: Tensor, word: int) -> Tensor:
    """log p(word) for one hidden state [D]."""
    w = weights
    head = torch.cat([w["embedding.embedding_0"] @ hidden, w["softmax.class_weight"] @ hidden]).log_softmax(0)
    band = band_of(word, edges)
    if band == 0:
        return head[word]
    inner = w[f"embedding.projection_{band}"].T @ hidden
    within = (w[f"embedding.embedding_{band}"] @ inner).log_softmax(0)
    return head[edges[1] + band - 1] + within[word - edges[band]]
