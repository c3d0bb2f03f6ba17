"""Settings of a memory that have the right type and cannot work; without torch, so that loading a recipe can ask."""

import math
from typing import NoReturn

from distlm.errors import UsageError
from distlm.memory.config import MemoryConfig
from distlm.models.kind import Refuse

_INT32_ROOT = 46340
"""Half keys of which the square is still an int32."""
_MOST = 2**20
"""Far beyond any model: the sizes of its tensors still fit 64 bits."""


def refuse_setting(key: str, value: object, mend: str) -> NoReturn:
    """Raises UsageError: the way to refuse where no file is known that the setting stands in."""
    raise UsageError(f"{key}={value}: {mend}")


def check_sizes(config: MemoryConfig, refuse: Refuse = refuse_setting) -> None:
    """Calls `refuse` with the field of `memory` that cannot work, its value and what would."""
    if config.key_width < 2 or config.key_width % 2:
        refuse("memory.key_width", config.key_width, "a query has two halves; set an even number")
    if not 1 <= config.sub_keys <= _INT32_ROOT:
        refuse("memory.sub_keys", config.sub_keys, f"set 1 to {_INT32_ROOT} (its square is an int32)")
    if not 1 <= config.k <= config.sub_keys:
        refuse("memory.k", config.k, f"set 1 to memory.sub_keys={config.sub_keys}")
    if config.heads < 1:
        refuse("memory.heads", config.heads, "must be at least 1")
    for name in ("key_width", "heads"):
        if getattr(config, name) > _MOST:
            refuse(f"memory.{name}", getattr(config, name), f"must be at most {_MOST}")


def check_rule(config: MemoryConfig, refuse: Refuse = refuse_setting) -> None:
    """The same for what decides how values are updated."""
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        refuse("memory.betas", config.betas, "give two numbers from 0 up to, not including, 1")
    if not config.eps > 0:
        refuse("memory.eps", config.eps, "must be above 0, or slots without gradient become NaN")
    for name in ("lr", "clip_norm"):
        if getattr(config, name) < 0:
            refuse(f"memory.{name}", getattr(config, name), "must not be below 0")
    if config.stale == "catch_up":
        if config.row_steps:
            refuse(
                "memory.row_steps", True,
                "contradicts memory.stale=catch_up: catching up counts the updates that a slot missed; set "
                "memory.row_steps=false or memory.stale=lazy",
            )  # fmt: skip
        if config.moments != "fp32":
            refuse(
                "memory.moments", config.moments,
                "contradicts memory.stale=catch_up, which repeats dense Adam's moments; set memory.moments=fp32 or "
                "memory.stale=lazy",
            )  # fmt: skip
        beta1, beta2 = config.betas
        if beta1 >= math.sqrt(beta2):
            refuse(
                "memory.betas", config.betas,
                "with memory.stale=catch_up slots that nobody reads would speed up for ever; set β₁ below √β₂, or "
                "memory.stale=lazy",
            )  # fmt: skip


def check_section(config: MemoryConfig, refuse: Refuse = refuse_setting) -> None:
    """All of the section that does not depend on the model."""
    if config.columns < 0:
        refuse("memory.columns", config.columns, "must not be negative")
    for name in ("input_dropout", "query_dropout", "value_dropout"):
        if not 0 <= (value := getattr(config, name)) < 1:
            refuse(f"memory.{name}", value, "must be in [0, 1)")
    if not 0 <= config.norm_momentum <= 1:
        refuse("memory.norm_momentum", config.norm_momentum, "must be in [0, 1]: the weight of the newest batch")
    check_sizes(config, refuse)
    check_rule(config, refuse)
    if config.kind == "none":
        return
    if config.positions != sorted(set(config.positions)) or any(position < 1 for position in config.positions):
        refuse("memory.positions", config.positions, "name layers, counted from 1, rising")


def check_fresh_ffn(config: MemoryConfig, init: str, key: str, refuse: Refuse = refuse_setting) -> None:
    """memory.fresh_ffn where the setting `key` is `init`."""
    if config.kind != "none" and config.fresh_ffn and (config.kind != "resm" or not init):
        refuse("memory.fresh_ffn", True, f"belongs to memory.kind=resm with {key}=")


def check_places(
    config: MemoryConfig, layers: int, width: int, keys: tuple[str, str], refuse: Refuse = refuse_setting
) -> None:
    """What depends on the model: its layers and its width D, which the settings `keys` give."""
    if config.kind == "none":
        return
    if config.positions and config.positions[-1] > layers:
        refuse("memory.positions", config.positions, f"the model has the layers 1 to {keys[0]}={layers}")
    if config.columns and width % config.columns:
        refuse("memory.columns", config.columns, f"must divide the model's width, {keys[1]}={width}")
