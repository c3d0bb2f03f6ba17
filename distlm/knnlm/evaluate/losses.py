"""The loss of every evaluated token as files, so that any two evaluations can be compared word by word.

RUN/losses/LABEL/
  dict.txt        the dictionary that the token ids belong to
  SPLIT/          targets int32 [Q]; lm, cache, knn … (those of records.NAMES that there are) fp64 [Q]: nats, .npy
  SPLIT/losses.json    what they are of; written last (records.py)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import UnsetType

from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError
from distlm.knnlm.evaluate.records import LossesFile
from distlm.knnlm.scoring import Floats
from distlm.runtime.checked import Written, problem
from distlm.runtime.files import atomic_path, file_hash, load_array, save_array
from distlm.system_errors import refuse

MARKER, WORDS = "losses.json", "dict.txt"


def write_losses(
    folder: Path,
    split: str,
    targets: npt.NDArray[np.integer],
    log_probs: Mapping[str, Floats],
    dictionary: Dictionary,
    context_rule: str,
    model: str,
    token_files: str,
) -> None:
    """Write FOLDER/SPLIT, and the dictionary beside it; `model` and `token_files` are fingerprints."""
    place = folder / split
    (place / MARKER).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    dictionary.save(folder / WORDS)
    hashes: dict[str, str] = {}
    arrays: dict[str, npt.NDArray[Any]] = {"targets": np.asarray(targets, np.int32)}
    for name, array in (arrays | {part: -scores for part, scores in log_probs.items()}).items():
        path = place / f"{name}.npy"
        with atomic_path(path) as temporary:
            save_array(temporary, array)
        hashes[name] = file_hash(path)
    LossesFile(
        kind="losses", split=split, tokens=len(targets), dictionary=dictionary.hash, context_rule=context_rule,
        model=model, token_files=token_files, hashes=hashes, dictionary_file=file_hash(folder / WORDS),
    ).write(place / MARKER)  # fmt: skip


def written_losses(marker: Path) -> list[Written]:
    """The arrays beside a losses.json as they were written."""
    facts = LossesFile.read(marker)
    mend = "run `distlm knn evaluate` again"
    found = [Written(marker.with_name(f"{name}.npy"), digest, mend) for name, digest in facts.hashes.items()]
    if not isinstance(facts.dictionary_file, UnsetType):
        found.append(Written(marker.parent.parent / WORDS, facts.dictionary_file, mend))
    return found


@dataclass(frozen=True)
class Losses:
    """One split's loss of every token under one model or mixture."""

    folder: Path
    name: str
    facts: LossesFile
    targets: npt.NDArray[np.int32]
    nats: Floats

    @classmethod
    def open(cls, folder: Path, split: str, name: str) -> "Losses":
        """Open FOLDER/SPLIT/NAME.npy. Raises DistlmError when it was not evaluated, or a file is cut."""
        marker = folder / split / MARKER
        if not marker.is_file():
            there = sorted(path.parent.name for path in folder.glob(f"*/{MARKER}"))
            found = f"; there are {', '.join(there)}" if there else "; run `distlm knn evaluate` first"
            raise DistlmError(f"{marker}: no losses of split {split}{found}")
        facts = LossesFile.read(marker)
        names = [key for key in facts.hashes if key != "targets"]
        if name not in names:
            raise DistlmError(f"{marker.parent}: no losses of {name!r}; there are {', '.join(names)}")
        arrays = []
        for part in ("targets", name):
            path = marker.parent / f"{part}.npy"
            if found := problem(Written(path, facts.hashes[part], "run `distlm knn evaluate` again")):
                raise DistlmError(found)
            try:
                arrays.append(load_array(path, mapped=False))
            except (OSError, ValueError) as error:
                refuse(error, path)
                raise DistlmError(f"{path}: missing or cut ({error}); run `distlm knn evaluate` again") from error
        return cls(folder, name, facts, *arrays)

    def words(self) -> list[str]:
        """The words of the ids."""
        return Dictionary.load(self.folder / WORDS).words
