"""Attention whose dropout masks belong to rows, for models with memory: torch's fused kernels where there is none."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from distlm.models.row_dropout import Rows, drop_by_row, name_salt

NAME = "distlm_rows"
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
"""What configurations of Hugging Face call the dropout on attention weights."""


def use_row_attention(hf: Any, rows: Rows) -> None:
    """Let a model that has dropout on attention weights draw it by row; others stay as they are."""
    text = hf.config.get_text_config()
    if not any(isinstance(p := getattr(text, name, 0), int | float) and p > 0 for name in _DROPOUTS):
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, row_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    hf.set_attn_implementation(NAME)
    for path, module in hf.named_modules():
        if hasattr(module, "layer_idx"):
            module.distlm_rows, module.distlm_salt = rows, name_salt(f"{path}.attention")


def row_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **named: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [B, heads, T, d], key and value [B, key heads, T, d]; attention_mask bool [B, 1, T, T], True where a key is
    seen, or None: the tokens up to one's own → [B, T, heads, d].

    With dropout the weights [B, heads, T, T] are made.
    """
    if dropout == 0:
        from transformers import AttentionInterface

        fused = AttentionInterface()["sdpa"]
        mixed, _ = fused(module, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **named)
        return mixed, None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(2, 3)) * (scaling or query.shape[-1] ** -0.5)
    if attention_mask is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    else:
        seen = attention_mask
    # fp32, as the fused kernels have it.
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    rows: Any = module.distlm_rows
    salt: Any = module.distlm_salt
    return torch.matmul(drop_by_row(weights, dropout, rows, salt), value).transpose(1, 2).contiguous(), None
