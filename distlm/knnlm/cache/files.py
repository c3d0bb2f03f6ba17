"""The neural cache's log-probability of every evaluated token at every window and θ, as files in RUN/cache/SPLIT.

A unit is the tokens of a unit of states: log_probs fp32 [q, windows, thetas], −inf where the target is not in the
window, NaN where the token has no cache yet. λ, θ and window are chosen from these files in seconds.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distlm.config.schema import CacheConfig
from distlm.errors import DistlmError
from distlm.knnlm.cache.records import CacheManifest, CachePlan
from distlm.knnlm.cache.scores import cache_log_probs, first_cached
from distlm.knnlm.scoring import Floats
from distlm.knnlm.search.neighbours import MANIFEST, PLAN
from distlm.knnlm.search.states import COMMAND, States
from distlm.knnlm.search.units import UnitFolder, read_arrays, read_manifest
from distlm.runtime.files import json_hash

BYTES = 4
"""Of one stored log-probability."""


def check_windows(cache: CacheConfig, split: str, tokens: int) -> None:
    """DistlmError when a window is longer than the split: no token would have a full cache."""
    longest = max(cache.windows)
    if first_cached(longest, "full") >= tokens:
        raise DistlmError(
            f"cache.windows={cache.windows}: split {split} has {tokens} tokens, so that none has more than {longest} "
            f"before it; choose windows of at most {tokens - 2} tokens"
        )


def cache_bytes(cache: CacheConfig, tokens: int) -> int:
    """Disk that the cache of so many tokens takes."""
    return tokens * len(cache.windows) * len(cache.thetas) * BYTES


class CacheWork:
    """The cache of one split, unit by unit; no method is collective."""

    def __init__(self, cache: CacheConfig, states: States, folder: Path) -> None:
        self.cache, self.states, self.split = cache, states, states.manifest.split
        plan = CachePlan(
            kind="cache", split=self.split, tokens=states.tokens, fill=cache.fill,
            windows=cache.windows, thetas=cache.thetas, tap=states.tap, states=states.fingerprint,
            context_rule=states.manifest.context_rule, model=states.manifest.model,
            token_files=states.manifest.token_files,
        )  # fmt: skip
        self.files = UnitFolder(folder, plan, CacheManifest, len(states.bounds) - 1, COMMAND)

    def compute_unit(self, number: int) -> None:
        """Score the tokens of one unit from its states and those of the window before it."""
        first, last = self.states.bounds[number : number + 2]
        origin = max(0, first - max(self.cache.windows))
        states = torch.from_numpy(self.states.rows("queries", origin, last).astype(np.float32))
        words = torch.from_numpy(self.states.rows("targets", origin, last).astype(np.int64))
        scores = cache_log_probs(
            states, words, origin, first, self.cache.windows, self.cache.thetas, self.cache.fill
        )  # fmt: skip
        stored = np.ascontiguousarray(np.moveaxis(scores, -1, 0), np.float32)
        self.files.write(number, {"log_probs": stored})


@dataclass(frozen=True)
class Cache:
    """The finished cache of one split."""

    folder: Path
    manifest: CacheManifest

    @classmethod
    def open(cls, folder: Path) -> "Cache":
        """Open a finished folder. Raises DistlmError as units.read_manifest."""
        return cls(folder, read_manifest(folder, CacheManifest.read, COMMAND))

    @staticmethod
    def is_started(folder: Path) -> bool:
        """A cache was made, or begun, in the folder."""
        return any((folder / name).is_file() for name in (PLAN, MANIFEST))

    @property
    def tokens(self) -> int:
        """Evaluated tokens Q."""
        return self.manifest.tokens

    @property
    def windows(self) -> list[int]:
        """Window sizes it holds, rising."""
        return self.manifest.windows

    @property
    def thetas(self) -> list[float]:
        """Values of θ it holds."""
        return self.manifest.thetas

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the manifest, which holds the hash of every array."""
        return json_hash(self.manifest.tree())

    def log_probs(self, window: int, theta: float) -> Floats:
        """log p_cache of every token, in order: fp64 [Q]. Raises ValueError for a window or θ it does not hold."""
        row, column = self.windows.index(window), self.thetas.index(theta)
        units = read_arrays(self.folder, self.manifest, "log_probs")
        return np.concatenate([np.asarray(unit[:, row, column], np.float64) for unit in units])

    def grid(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """log p_cache at every point: fp32 [windows, thetas, Q]."""
        units = np.concatenate(list(read_arrays(self.folder, self.manifest, "log_probs")))
        return np.ascontiguousarray(np.moveaxis(units, 0, -1))

    def require(self, where: str, **facts: object) -> None:
        """Raises DistlmError when the cache was made from something else: `facts` are fields of the manifest as `where`
        has them."""
        for key, value in facts.items():
            if (found := getattr(self.manifest, key)) != value:
                raise DistlmError(
                    f"{self.folder / MANIFEST}: {key} {found!r}, {where} has {value!r}: the cache belongs "
                    f"to another {key}; remove {self.folder} and run `{COMMAND}` again"
                )
