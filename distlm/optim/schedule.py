"""Learning rate as a pure function of the update number, so that a resumed run needs no schedule state."""

import math

from distlm.config.training import UpdatesConfig
from distlm.errors import UsageError


def learning_rate(config: UpdatesConfig, update: int) -> float:
    """Rate that the update with 0-based number `update` uses.

    Linear from `warmup_init_lr` (update 0) to `lr` (update `warmup_updates`), then `config.schedule`.
    Raises DistlmError for a cosine whose cycles have no length or shrink in length.
    """
    if update < 0:
        raise ValueError(f"update={update}")
    if update < config.warmup_updates:
        return config.warmup_init_lr + (config.lr - config.warmup_init_lr) * update / config.warmup_updates
    match config.schedule:
        case "cosine":
            return _cosine(config, update - config.warmup_updates)
        case "inverse_sqrt":
            return config.lr * math.sqrt(max(config.warmup_updates, 1) / max(update, 1))
        case "linear":
            left = (config.updates - update) / max(config.updates - config.warmup_updates, 1)
            return config.min_lr + (config.lr - config.min_lr) * max(left, 0.0)
        case "constant":
            return config.lr


def _cosine(config: UpdatesConfig, update: int) -> float:
    """Cosine with warm restarts (Loshchilov & Hutter 2017, eq. 5), as fairseq: cycle i is t_mult^i periods long and
    its peak and floor are scaled by shrink^i. `update` counts from the end of warm-up."""
    if config.cosine_period < 1 or config.cosine_t_mult < 1:
        raise UsageError(
            f"train.cosine_period={config.cosine_period}, train.cosine_t_mult={config.cosine_t_mult}: "
            "both must be at least 1"
        )
    length, position, scale = float(config.cosine_period), float(update), 1.0
    while position >= length:
        position -= length
        length *= config.cosine_t_mult
        scale *= config.cosine_shrink
    low, high = config.min_lr * scale, config.lr * scale
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * position / length))
