"""Values that have the right type and cannot work: refused at loading, before anything is started."""

import os
import re
from collections.abc import Sequence

from distlm.config.schema import AUTO, ID_BYTES, SPLITS, KnnConfig, RunConfig
from distlm.models.kind import Refuse
from distlm.models.registry import kind

_AT_LEAST_ONE = (
    "data.min_count", "data.pad_to_multiple", "train.keep_last", "train.log_every",
    "datastore.batch_blocks", "datastore.rows_per_shard", "index.sample", "knn.block", "knn.batch_blocks",
    "knn.blocks_per_unit", "knn.k", "knn.nprobe", "launch.ranks",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "data.max_words", "data.first_words", "train.weight_decay", "train.clip_norm", "train.lr", "train.valid_every",
    "train.save_every", "train.max_updates_this_run", "datastore.block", "knn.buckets", "knn.ladder_sample",
    "knn.context_window", "launch.threads", "index.max_bytes_per_key", "index.max_memory", "knn.candidates",
)  # fmt: skip


def check_values(config: RunConfig, refuse: Refuse) -> None:
    """Calls `refuse` with the setting, its value and what would do."""
    at_least(config, refuse, 1, _AT_LEAST_ONE)
    at_least(config, refuse, 0, _AT_LEAST_ZERO)
    at_least(config, refuse, -1, ("datastore.context_window",))
    if config.data.tokenizer and config.data.dictionary:
        refuse("data.dictionary", config.data.dictionary, "the tokens of data.tokenizer are its own; leave one out")
    shares(config, refuse, "data")
    kind(config.model.kind).check(config, refuse)
    _check_names(config, refuse)
    _check_index(config, refuse)
    _check_candidates(config, refuse)
    _check_grids(config, refuse)
    _check_cache(config, refuse)


def at_least(config: RunConfig, refuse: Refuse, least: int, keys: Sequence[str]) -> None:
    """Refuse settings below a bound."""
    for key in keys:
        if (value := _value(config, key)) < least:
            refuse(
                key,
                int(value) if value == int(value) else value,
                "must not be negative" if least == 0 else f"must be at least {least}",
            )


def at_most(config: RunConfig, refuse: Refuse, most: int, keys: Sequence[str]) -> None:
    """Refuse settings above a bound."""
    for key in keys:
        if (value := _value(config, key)) > most:
            refuse(key, int(value), f"must be at most {most}")


MOST_LAYERS, MOST_WIDTH = 1000, 2**20
"""Far beyond any model: the sizes of its tensors still fit 64 bits, and it can be described without memory."""


def fractions(config: RunConfig, refuse: Refuse, keys: Sequence[str]) -> None:
    """Refuse settings outside [0, 1)."""
    for key in keys:
        if not 0 <= (value := _value(config, key)) < 1:
            refuse(key, value, "must be in [0, 1)")


def shares(config: RunConfig, refuse: Refuse, section: str) -> None:
    """Refuse shares of the documents that leave train nothing; `section`: data or shards."""
    keys = (f"{section}.valid_share", f"{section}.test_share")
    fractions(config, refuse, keys)
    if sum(_value(config, key) for key in keys) >= 1:
        refuse(keys[1], _value(config, keys[1]), f"with {keys[0]}={_value(config, keys[0])} nothing is left for train")


def adam(betas: Sequence[float], eps: float, keys: tuple[str, str], refuse: Refuse) -> None:
    """Refuse β₁, β₂ and ε that Adam cannot work with; `keys`: the names of the two settings."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        refuse(keys[0], list(betas), "must be two numbers in [0, 1), β₁ and β₂")
    if eps <= 0:
        refuse(keys[1], eps, "must be above 0")


def lengths(config: RunConfig, refuse: Refuse, limit: int, setting: str, further: dict[str, int] | None = None) -> None:
    """Refuse sequences that are longer than a model takes: `limit` is the value of `setting`; `further`: others."""
    longest = {
        **(further or {}),
        "datastore.context_window + datastore.block": config.datastore.context_window + config.datastore.block,
        "knn.context_window + knn.block": config.knn.context_window + config.knn.block,
    }
    for key, length in longest.items():
        if length > limit:
            refuse(key, length, f"exceeds {setting}={limit}")


def position_warnings(config: RunConfig) -> list[str]:
    """What will run and is unlikely to be meant."""
    return kind(config.model.kind).warnings(config)


def _value(config: RunConfig, key: str) -> float:
    section, _, name = key.partition(".")
    return float(getattr(getattr(config, section), name))


def _check_names(config: RunConfig, refuse: Refuse) -> None:
    if not config.name.strip() or "/" in config.name or config.name.startswith(".") or not config.name.isprintable():
        refuse("name", config.name, "a name without / and no dot before it: it becomes the name of a folder")
    if not re.fullmatch(r"[\w.-]*", config.index.name) or config.index.name.startswith("."):
        refuse("index.name", config.index.name, "letters, digits, . _ and - alone: it is the name of a folder")
    seen = {os.path.realpath(config.run_dir): "the run itself"}
    for run in config.knn.extra_runs:
        place = os.path.realpath(run)
        if place in seen:
            refuse("knn.extra_runs", config.knn.extra_runs, f"{run} is {seen[place]}; name other runs, each once")
        seen[place] = "there twice"


def _check_index(config: RunConfig, refuse: Refuse) -> None:
    index = config.index
    for name in ("max_bytes_per_key", "max_memory"):
        if index.factory != AUTO and (value := getattr(index, name)):
            refuse(f"index.{name}", value, f"is read with index.factory={AUTO} alone; set it to 0, or that to {AUTO}")
    if 0 < index.max_bytes_per_key <= ID_BYTES:
        refuse("index.max_bytes_per_key", index.max_bytes_per_key,
               f"an id takes {ID_BYTES} bytes; set at least {ID_BYTES + 1}, or 0 for the default")  # fmt: skip


def _check_candidates(config: RunConfig, refuse: Refuse) -> None:
    knn = config.knn
    chooses = knn.search == "index" and knn.distances == "exact" and knn.similarity == "l2"
    if knn.candidates > knn.k and not chooses:
        refuse("knn.candidates", knn.candidates, "is for neighbours of an index that exact squared L2 orders; set 0, "
               "or knn.search=index knn.distances=exact knn.similarity=l2")  # fmt: skip


def _check_grids(config: RunConfig, refuse: Refuse) -> None:
    knn = config.knn
    if knn.carry and not kind(config.model.kind).carries:
        refuse("knn.carry", True, f"a {config.model.kind} has no state to carry; leave it out")
    if knn.carry and knn.context_window:
        refuse(
            "knn.context_window",
            knn.context_window,
            "knn.carry=true reads a split in one go; set it to 0, or knn.carry=false",
        )
    if not knn.splits:
        refuse("knn.splits", knn.splits, "name at least the split to tune on, e.g. [valid, test]")
    if wrong := [split for split in knn.splits if split not in SPLITS or knn.splits.count(split) > 1]:
        refuse("knn.splits", knn.splits, f"{wrong[0]!r}: name some of {', '.join(SPLITS)}, each once")
    if knn.similarity == "dot" and knn.search == "index" and knn.distances == "quantised":
        refuse("knn.similarity", "dot", "is computed from the true keys; set knn.distances=exact")
    grids(knn, refuse)


def grids(knn: KnnConfig, refuse: Refuse) -> None:
    """Refuse values of k, λ and temperature that cannot be tried."""
    if not all(k >= 1 for k in knn.ks):
        refuse("knn.ks", knn.ks, "each must be at least 1")
    if not knn.lambdas or not all(0 <= weight < 1 for weight in knn.lambdas):
        refuse("knn.lambdas", knn.lambdas, "each must be in [0, 1)")
    if not knn.temperatures or not all(temperature > 0 for temperature in knn.temperatures):
        refuse("knn.temperatures", knn.temperatures, "each must be above 0")


def _check_cache(config: RunConfig, refuse: Refuse) -> None:
    cache = config.cache
    if not cache.windows or cache.windows != sorted(set(cache.windows)) or cache.windows[0] < 1:
        refuse("cache.windows", cache.windows, "must be rising positive numbers of tokens")
    if not cache.thetas or len(set(cache.thetas)) < len(cache.thetas) or not all(theta > 0 for theta in cache.thetas):
        refuse("cache.thetas", cache.thetas, "each must be above 0, and there once")
    if not cache.lambdas or not all(0 <= weight < 1 for weight in cache.lambdas):
        refuse("cache.lambdas", cache.lambdas, "each must be in [0, 1)")
