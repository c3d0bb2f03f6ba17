"""What training by numbered updates cannot work with (settings of training.py)."""

from distlm.config.check import adam, at_least, fractions
from distlm.config.schema import RunConfig
from distlm.config.training import BlocksConfig, UpdatesConfig
from distlm.models.kind import Refuse


def check_updates(config: RunConfig, refuse: Refuse, least_updates: int = 1) -> None:
    """Settings of UpdatesConfig. `least_updates`: 0 where a model may be taken as it is."""
    train = config.section(UpdatesConfig)
    at_least(config, refuse, 1, ("train.blocks_per_update", "train.micro_blocks"))
    at_least(config, refuse, least_updates, ("train.updates",))
    at_least(config, refuse, 0, ("train.warmup_updates", "train.warmup_init_lr", "train.min_lr"))
    if train.schedule == "cosine":
        at_least(config, refuse, 1, ("train.cosine_period", "train.cosine_t_mult"))
        at_least(config, refuse, 0, ("train.cosine_shrink",))
    if train.optimizer == "nag":
        fractions(config, refuse, ("train.momentum",))
    adam(train.adam_betas, train.adam_eps, ("train.adam_betas", "train.adam_eps"), refuse)
    if train.blocks_per_update % train.micro_blocks:
        refuse(
            "train.blocks_per_update", train.blocks_per_update,
            f"must be a multiple of train.micro_blocks={train.micro_blocks}",
        )  # fmt: skip


def updates_in_small(train: UpdatesConfig, share: float) -> dict[str, object]:
    """Settings that make training by updates do about this share of its work, from fresh weights."""
    return {
        "train.updates": max(min(3, train.updates), round(train.updates * share)), "train.schedule": "constant",
        "train.warmup_updates": 0, "train.init_from": "",
    }  # fmt: skip


def check_blocks(config: RunConfig, refuse: Refuse, least_updates: int = 1) -> None:
    """Settings of BlocksConfig; `least_updates` as for check_updates."""
    config.section(BlocksConfig)
    check_updates(config, refuse, least_updates)
    at_least(config, refuse, 1, ("train.tokens_per_sample",))
    at_least(config, refuse, 0, ("train.l2_weight",))
