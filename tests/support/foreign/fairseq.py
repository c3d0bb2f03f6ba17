"""Checkpoints of a small transformer_lm_wiki103 in fairseq's format, of the sizes of support.TINY."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WIDTH, INNER, HEADS, EDGES = 32, 64, 2, [0, 20, 40]


def fairseq_model(words: int, joined: bool = False) -> dict[str, Tensor]:
    """A state dict as fairseq's TransformerLanguageModel has it, shared tensors under each of their names."""
    torch.manual_seed(3)
    state = {"decoder.version": torch.Tensor([3.0]), "decoder.embed_tokens._float_tensor": torch.zeros(1)}
    bounds = [*EDGES, words]
    for band in range(3):
        inner = WIDTH // 4**band
        state[f"decoder.embed_tokens.embeddings.{band}.0.weight"] = (
            torch.randn(bounds[band + 1] - bounds[band], inner) * 0.2
        )
        state[f"decoder.embed_tokens.embeddings.{band}.1.weight"] = torch.randn(WIDTH, inner) * 0.3
    state["decoder.embed_positions._float_tensor"] = torch.zeros(1)
    for layer in range(2):
        name = f"decoder.layers.{layer}."
        parts = {"self_attn.in_proj_": (3 * WIDTH, WIDTH)} if joined else {
            f"self_attn.{part}_proj.": (WIDTH, WIDTH) for part in "kvq"
        }  # fmt: skip
        parts |= {"self_attn.out_proj.": (WIDTH, WIDTH), "fc1.": (INNER, WIDTH), "fc2.": (WIDTH, INNER)}
        for part, shape in parts.items():
            state[f"{name}{part}weight"] = torch.randn(shape) * 0.2
            state[f"{name}{part}bias"] = torch.randn(shape[0]) * 0.2
        for part in ("self_attn_layer_norm.", "final_layer_norm."):
            state[f"{name}{part}weight"] = 1 + 0.2 * torch.randn(WIDTH)
            state[f"{name}{part}bias"] = 0.2 * torch.randn(WIDTH)
    head = "decoder.adaptive_softmax."
    state[f"{head}buffer"], state[f"{head}head._float_tensor"] = torch.zeros(1, dtype=torch.long), torch.zeros(1)
    state[f"{head}head.word_proj.weight"] = state["decoder.embed_tokens.embeddings.0.0.weight"]
    state[f"{head}head.class_proj.weight"] = torch.randn(2, WIDTH) * 0.3
    for tail in range(2):
        state[f"{head}tail.{tail}.0.weight"] = state[f"decoder.embed_tokens.embeddings.{tail + 1}.1.weight"]
        state[f"{head}tail.{tail}.2.weight"] = state[f"decoder.embed_tokens.embeddings.{tail + 1}.0.weight"]
    return state


def write_checkpoint(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    """As fairseq's trainer writes it."""
    args = argparse.Namespace(arch="transformer_lm_wiki103", decoder_attention_heads=HEADS, tokens_per_sample=64)
    content = {"args": args, "model": state, "optimizer_history": [{"num_updates": 7}], "extra_state": {"epoch": 1}}
    torch.save({**content, **more}, path)
    return path
