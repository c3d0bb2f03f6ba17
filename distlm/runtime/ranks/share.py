"""Shares: a stage's units over independent processes without MPI, as the tasks of a job array are (`launch.share`)."""

import re
from dataclasses import dataclass

from distlm.config.schema import RunConfig
from distlm.errors import UsageError


@dataclass(frozen=True, slots=True)
class Share:
    """Number `index` of `count` processes: it does the units index, index + count, index + 2 count, …

    Which units those are does not depend on what is finished, so shares never meet, whenever each one starts.
    """

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def has(self, unit: int) -> bool:
        """Whether it is this share's unit."""
        return unit % self.count == self.index


def share_of(config: RunConfig, ranks: int) -> Share | None:
    """The share that `launch.share` asks for, None without one.

    Raises UsageError for anything but K/N with 0 ≤ K < N, and for a share on several ranks.
    """
    text = config.launch.share
    if not text:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if match is None or not int(match[1]) < int(match[2]):
        raise UsageError(f"launch.share={text}: expected K/N with 0 <= K < N, e.g. launch.share=0/4")
    if ranks > 1:
        raise UsageError(
            f"launch.share={text}: a share is one process, and this step has {ranks} ranks; start it on one rank "
            "(srun --ntasks=1), or leave launch.share out and let the ranks divide the work"
        )
    return Share(int(match[1]), int(match[2]))
