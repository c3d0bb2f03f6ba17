"""`distlm clean`: removes what a run has made, and everything that was made from it."""

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from distlm.errors import UsageError
from distlm.runtime.files import bytes_below, format_bytes
from distlm.runtime.lock import LOCK, only_writer
from distlm.runtime.ranks.comm import SingleComm

WHAT = ("search", "index", "datastore", "train")
"""What can be removed; each takes those before it along."""
_FILES = {
    "search": ("neighbours", "states", "cache", "tuned", "results", "losses", "knn.json", "results.json",
               "report.html", "questions.md", "questions.csv", "frequency-*", "clusters-*", "words-*.csv",
               "configs/knn.yaml"),
    "index": ("index", "configs/index.yaml"),
    "datastore": ("datastore", "index-tune", "configs/datastore.yaml"),
    "train": ("checkpoints", "finetune", "lm.json", "configs/train.yaml", "configs/finetune.yaml"),
}  # fmt: skip
"""Names below the run directory, or patterns of them. What lies elsewhere (datastore.folder and the like) belongs to
others and stays."""


@dataclass(frozen=True)
class Doomed:
    """A file or folder to be removed."""

    path: Path
    bytes: int


def doomed(root: Path, what: str, only: str = "") -> list[Doomed]:
    """What `distlm clean RUN WHAT` removes, in the order of removal: first what was made last.

    `only`: name of one index, or label of one question. Raises UsageError for a folder that is no run, an unknown
    WHAT, and a name that is not there.
    """
    if not (root / "config.yaml").is_file():
        raise UsageError(f"{root}: no run directory (no config.yaml in it); give one as `distlm clean RUN_DIR {what}`")
    if what not in WHAT:
        raise UsageError(f"clean {what!r}: expected one of {', '.join(WHAT)}")
    names = _of_one(root, what, only) if only else [n for part in WHAT[: WHAT.index(what) + 1] for n in _FILES[part]]
    paths = [path for name in names for path in (sorted(root.glob(name)) if "*" in name else [root / name])]
    return [Doomed(path, _size(path)) for path in paths if os.path.lexists(path)]


def remove(things: Sequence[Doomed]) -> None:
    """Remove them. Raises Busy while another process writes one of them: nothing is removed then."""
    with ExitStack() as held:
        for thing in things:
            for lock in sorted(thing.path.rglob(LOCK)) if thing.path.is_dir() else []:
                held.enter_context(only_writer(lock.parent, SingleComm(), f"`distlm clean` of {thing.path}"))
        for thing in things:
            # Renamed first: a kill in the middle leaves nothing that looks whole.
            aside = thing.path.with_name(f".{thing.path.name}.{os.getpid()}.removed")
            thing.path.rename(aside)
            if aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside)
            else:
                aside.unlink()


def as_text(things: Sequence[Doomed], removed: bool) -> str:
    """For people."""
    if not things:
        return "nothing to remove"
    lines = [f"{format_bytes(thing.bytes):>10}  {thing.path}" for thing in things]
    total = format_bytes(sum(thing.bytes for thing in things))
    return "\n".join([*lines, f"{total:>10}  {'removed' if removed else 'would be removed'}"])


def _of_one(root: Path, what: str, only: str) -> list[str]:
    """One index and the searches in it, or one search."""
    if what not in ("search", "index") or "/" in only or only.startswith("."):
        raise UsageError(f"clean {what} --only {only}: names an index (clean index) or a question (clean search)")
    labels = [only] if what == "search" else sorted(
        {path.stem if path.suffix == ".json" else path.name
         for folder in ("neighbours", "tuned", "results", "losses") for path in (root / folder).glob(f"{only}_*")}
    )  # fmt: skip
    names = [] if what == "search" else [f"index/{only}"]
    for label in labels:
        names += [f"neighbours/{label}", f"tuned/{label}.json", f"results/{label}.json", f"losses/{label}"]
    if not any((root / name).exists() for name in names):
        place = "index" if what == "index" else "neighbours"
        there = sorted(path.name for path in (root / place).glob("*") if path.is_dir()) or ["none"]
        raise UsageError(f"clean {what} --only {only}: not in {root / place}; there are {', '.join(there)}")
    return names


def _size(path: Path) -> int:
    return bytes_below(path) if path.is_dir() and not path.is_symlink() else path.lstat().st_size
