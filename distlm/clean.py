"""`distlm clean`: removes what a run has made, and everything that was made from it."""

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from distlm.errors import UsageError
from distlm.runtime.files import bytes_below, format_bytes
from distlm.runtime.lock import LOCK, only_writer
from distlm.runtime.question import index_of
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
_ASIDE = re.compile(r"\.(.+)\.\d+\.removed")
"""Name of a thing that is being removed, or of what is left of it where its removal was ended."""


@dataclass(frozen=True)
class Doomed:
    """A file or folder to be removed."""

    path: Path
    bytes: int


def doomed(root: Path, what: str, only: str = "") -> list[Doomed]:
    """What `distlm clean RUN WHAT` removes, in the order of removal: first what was made last.

    `only`: name of one index, or label of one question. What a removal that was ended has left comes with it, whatever
    that one was for. Raises UsageError for a folder that is no run, an unknown WHAT, and a name that is not there.
    """
    if not (root / "config.yaml").is_file():
        raise UsageError(f"{root}: no run directory (no config.yaml in it); give one as `distlm clean RUN_DIR {what}`")
    if what not in WHAT:
        raise UsageError(f"clean {what!r}: expected one of {', '.join(WHAT)}")
    if only:
        paths = _of_one(root, what, only)
    else:
        names = [name for part in WHAT[: WHAT.index(what) + 1] for name in _FILES[part]]
        paths = [path for name in names for path in (sorted(root.glob(name)) if "*" in name else [root / name])]
    paths += [path for path in _left_behind(root) if path.parent not in paths]
    return [Doomed(path, _size(path)) for path in paths if os.path.lexists(path)]


def remove(things: Sequence[Doomed]) -> None:
    """Remove them. Raises Busy while another process writes one of them: nothing is removed then."""
    with ExitStack() as held:
        for thing in things:
            for lock in sorted(thing.path.rglob(LOCK)) if thing.path.is_dir() else []:
                held.enter_context(only_writer(lock.parent, SingleComm(), f"`distlm clean` of {thing.path}"))
        for thing in things:
            aside = thing.path
            if not _ASIDE.fullmatch(aside.name):
                # Renamed first: a kill in the middle leaves nothing that looks whole.
                aside = thing.path.rename(thing.path.with_name(f".{thing.path.name}.{os.getpid()}.removed"))
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


def _of_one(root: Path, what: str, only: str) -> list[Path]:
    """One index and the searches in it, or one search."""
    if what not in ("search", "index") or "/" in only or only.startswith("."):
        raise UsageError(f"clean {what} --only {only}: names an index (clean index) or a question (clean search)")
    answers = [root / folder for folder in ("neighbours", "tuned", "results", "losses")]

    def belongs(name: str) -> bool:
        label = name.removesuffix(".json")
        return label == only or (what == "index" and index_of(label) == only)

    paths = [root / "index" / only] if what == "index" else []
    paths += [path for folder in answers for path in sorted(folder.glob("*")) if belongs(path.name)]
    ended = (found[1] for path in _left_behind(root) if (found := _ASIDE.fullmatch(path.name)))
    if not any(path.exists() for path in paths) and not any(map(belongs, ended)):
        place = root / ("index" if what == "index" else "neighbours")
        there = sorted(path.name for path in place.glob("[!.]*") if path.is_dir()) or ["none"]
        raise UsageError(f"clean {what} --only {only}: not in {place}; there are {', '.join(there)}")
    return paths


def _left_behind(root: Path) -> list[Path]:
    """What removals that were ended have renamed and not removed."""
    folders = [root, *sorted(path for path in root.glob("[!.]*") if path.is_dir() and not path.is_symlink())]
    return [path for folder in folders for path in sorted(folder.glob(".*")) if _ASIDE.fullmatch(path.name)]


def _size(path: Path) -> int:
    return bytes_below(path) if path.is_dir() and not path.is_symlink() else path.lstat().st_size
