"""FBGEMM's table-batched embeddings, whose backward makes the update, as values of a memory."""

import importlib.util

import torch
from torch import Tensor, nn

MISSING = "fbgemm-gpu-cpu is not installed (pip install fbgemm-gpu-cpu==1.8.0 goes with torch 2.13)"
FORMS = {
    "fbgemm_adagrad": ("EXACT_ADAGRAD", "FP32"),
    "fbgemm_rowwise": ("EXACT_ROWWISE_ADAGRAD", "FP32"),
    "fbgemm_sgd": ("EXACT_SGD", "FP32"),
    "fbgemm_rowwise_fp16": ("EXACT_ROWWISE_ADAGRAD", "FP16"),
}
"""Variant → its optimizer (on processors it has no Adam) and what the values are kept in; 1.8.0 cannot read values in
bf16 on processors (NotImplementedError)."""


def available() -> bool:
    return importlib.util.find_spec("fbgemm_gpu") is not None


class Values(nn.Module):
    """K values of width D, on the processor."""

    def __init__(self, variant: str, slots: int, width: int, lr: float) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
            EmbeddingLocation,
        )
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        super().__init__()
        optimizer, kept = FORMS[variant]
        self.tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(slots, width, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=EmbOptimType[optimizer],
            learning_rate=lr, weights_precision=SparseType[kept], output_dtype=SparseType.FP32,
        )  # fmt: skip
        self.tables.init_embedding_weights_uniform(-(width**-0.5), width**-0.5)

    def forward(self, slots: Tensor, per_sample_weights: Tensor) -> Tensor:
        """slots int32 [T, A], weights fp32 [T, A] → fp32 [T, D]."""
        offsets = torch.arange(0, slots.numel() + 1, slots.shape[1])
        out: Tensor = self.tables(slots.flatten().long(), offsets, per_sample_weights=per_sample_weights.flatten())
        return out
