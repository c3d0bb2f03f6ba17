"""Attention of the masked language models: torch's fused kernels, or explicit weights where they have dropout."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlm.models.row_dropout import RowDropout

NAME = "distlm"


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query, key, value [B, heads, T, d]; attention_mask bool [B, 1, T or 1, T], True where a key is seen → [B, T,
    heads, d].

    With dropout the weights [B, heads, T, T] are made, because their masks belong to rows; without it they are not.
    """
    if dropout == 0:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return mixed.transpose(1, 2).contiguous(), None
    drop = module.dropout
    assert isinstance(drop, RowDropout)
    scores = torch.matmul(query, key.transpose(2, 3)) * (scaling or query.shape[-1] ** -0.5)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -math.inf)
    # fp32, as the fused kernels have it.
    weights = drop(scores.softmax(-1, dtype=torch.float32).to(query.dtype))
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the function known to transformers under NAME."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, row_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
