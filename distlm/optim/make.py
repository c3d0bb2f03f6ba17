"""The optimizer of the dense weights, by train.optimizer."""

import torch

from distlm.config.training import UpdatesConfig
from distlm.optim.nag import NAG


def make_optimizer(train: UpdatesConfig, module: torch.nn.Module) -> torch.optim.Optimizer:
    """`train.optimizer` over all parameters; weight decay is decoupled in both."""
    if train.optimizer == "nag":
        return NAG(module.parameters(), lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    first, second = train.adam_betas
    # Fused: one pass over the memory instead of ten.
    return torch.optim.AdamW(
        module.parameters(), lr=train.lr, betas=(first, second), eps=train.adam_eps,
        weight_decay=train.weight_decay, fused=True,
    )  # fmt: skip
