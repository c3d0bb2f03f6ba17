"""`distlm verify`: every file of a run, or of a folder of it, against what was written.

A record (JSON) has a checksum of its own, and is the place of the checksums of all other files. What only people read
(logs, reports) and config.yaml, which is the user's, have none and are not looked at.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlm.data.shards.reader import written_shards
from distlm.data.shards.records import KIND as ROWS
from distlm.data.tokens import TokenFiles
from distlm.datastore.reader import Datastore
from distlm.datastore.records import KIND as STORE
from distlm.errors import DistlmError
from distlm.index.state import written_index
from distlm.knnlm.evaluate.losses import written_losses
from distlm.knnlm.search.neighbours import written_units
from distlm.knnlm.search.records import UnitFacts
from distlm.runtime.checked import Written, problem
from distlm.runtime.files import format_bytes, read_json
from distlm.runtime.progress import Progress
from distlm.runtime.ranks.comm import Comm
from distlm.runtime.records import CHECK, checksum
from distlm.system_errors import system_error

_DATA = {".npy", ".bin", ".tar", ".index", ".safetensors"}
"""Files that belong to a record. Another one of them is a stranger, which a reader might take for its own."""
_OTHERS = {"logs", "launch", "wandb", "tensorboard", "code", "plots"}
"""Folders of a run without results."""


@dataclass
class Part:
    """A folder of results, or one record."""

    place: Path
    files: list[Written] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    older: int = 0
    """Records from before there were checksums."""

    @property
    def bytes(self) -> int:
        """Of its files."""
        return sum(file.path.stat().st_size for file in self.files if file.path.is_file())


def parts_below(root: Path) -> list[Part]:
    """What there is below a folder, or the folder of one file; records are read, the files that they name are not yet.

    Raises DistlmError when there is nothing that could be verified.
    """
    if not root.exists():
        raise DistlmError(f"{root}: no such file or folder; give a run directory, a folder of one, or a file")
    found = {path: _part(path) for path in (_records(root) if root.is_dir() else _near(root))}
    owned = {file.path for part in found.values() for file in part.files}
    if root.is_file():
        parts = [part for place, part in found.items() if place == root or any(f.path == root for f in part.files)]
        for part in parts:
            part.files = [file for file in part.files if file.path == root or part.place == root]
    else:
        parts = list(found.values())
        # A record that cannot be read names no files, and has its own line about that.
        unknown = {part.place.parent for part in parts if part.problems} - {root}
        strays = (
            path for path in _files(root)
            if path.suffix in _DATA and path not in owned and not unknown & {*path.parents}
        )  # fmt: skip
        parts += [Part(path, problems=[f"{path}: belongs to no record here: nothing reads it, or its folder is not "
                                       "finished; run its stage again, or remove it"]) for path in strays]  # fmt: skip
    if not parts:
        raise DistlmError(f"{root}: nothing to verify: no record says what was written there")
    return parts


def verify(comm: Comm, root: Path, parts: list[Part]) -> list[str]:
    """Read every file once, each on one rank: what is wrong with all of them. Collective."""
    files = list({file.path: file for part in parts for file in part.files}.values())
    total = sum(part.bytes for part in parts)
    problems = [found for part in parts for found in part.problems]
    with Progress(f"verify {root}", total, "bytes", comm.rank) as progress:
        for first in range(0, len(files), comm.size):
            turn = files[first : first + comm.size]
            own = [found for file in turn[comm.rank : comm.rank + 1] if (found := problem(file))]
            problems += [found for of_rank in comm.allgather(own) for found in of_rank]
            progress.advance(sum(file.path.stat().st_size for file in turn if file.path.is_file()))
    return problems


def table(root: Path, parts: list[Part], problems: list[str]) -> str:
    """A line for each part of a run: its files and bytes; and the sum of it all."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        inner = part.place.relative_to(root).parts if root in part.place.parents else (part.place.name,)
        groups.setdefault("/".join(inner[:2] if len(inner) > 2 else inner[:1]), []).append(part)
    lines = []
    for name, group in groups.items():
        files = {file.path for part in group for file in part.files}
        size = sum(path.stat().st_size for path in files if path.is_file())
        lines.append(f"{name:<36}{len(group):>5} records{len(files):>7} files{format_bytes(size):>12}")
    older = sum(part.older for part in parts)
    note = f"; {older} records are from before they had checksums" if older else ""
    return "\n".join([*lines, f"{root}: {f'{len(problems)} problems' if problems else 'whole'}{note}"])


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink():
            continue
        if path.is_dir() and path.name not in _OTHERS:
            yield from _files(path)
        elif path.is_file():
            yield path


def _records(folder: Path) -> Iterator[Path]:
    return (path for path in _files(folder) if path.suffix == ".json")


def _near(file: Path) -> list[Path]:
    """The records that may name a file: beside it, in the folder above, and in those of its folder (dict.txt)."""
    folder = file.parent
    return sorted({*folder.glob("*.json"), *folder.parent.glob("*.json"), *folder.glob("*/*.json")})


def _part(path: Path) -> Part:
    """A record and the files it names."""
    part = Part(path)
    try:
        tree = read_json(path, "a record")
        if isinstance(tree, dict) and CHECK in tree:
            rest = {name: value for name, value in tree.items() if name != CHECK}
            if checksum(rest) != tree[CHECK]:
                raise DistlmError(f"{path}: damaged: its content is not what its checksum was made of")
        elif isinstance(tree, dict) and "format" in tree:
            part.older = 1
            *names, last = tree
            if tree[last] == checksum({name: tree[name] for name in names}):
                raise DistlmError(f"{path}: damaged: its last entry is called {last!r} instead of {CHECK!r}")
        if isinstance(tree, dict):
            part.files = _named(path, tree)
    except DistlmError as error:
        part.problems.append(str(error))
    except OSError as error:
        part.problems.append(str(system_error(error, path)))
    return part


def _named(path: Path, tree: dict[str, Any]) -> list[Written]:
    """The files whose checksums a record has. Raises DistlmError as the readers of such a folder."""
    for fits, files in _KINDS:
        if fits(path, tree):
            try:
                return files(path, tree)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                # Its checksum is right: somebody has written it so.
                raise DistlmError(
                    f"{path}: does not name the files of its folder as such a record does ({error}); make it again"
                ) from error
    return []


def _marked(path: Path, tree: dict[str, Any]) -> list[Written]:
    mend = "copy the folder again"
    return [Written(path.parent / name, str(facts["hash"]), mend) for name, facts in tree["files"].items()]


def _arrays(path: Path, tree: dict[str, Any]) -> list[Written]:
    mend = f"remove {path.parent} and run the stage again"
    return [Written(path.with_name(f"{name}.npy"), str(digest), mend) for name, digest in tree["hashes"].items()]


def _units(path: Path, tree: dict[str, Any]) -> list[Written]:
    units = [UnitFacts(unit["rows"], unit["hashes"]) for unit in tree["units"]]
    command = {"neighbours": "distlm knn search", "cache": "distlm knn cache"}.get(tree.get("kind", ""), "its stage")
    return written_units(path.parent, units, command)


def _tokens(path: Path, _tree: dict[str, Any]) -> list[Written]:
    return TokenFiles.open(path.parent).written()


def _beside(name: str, key: str) -> Callable[[Path, dict[str, Any]], list[Written]]:
    def files(path: Path, tree: dict[str, Any]) -> list[Written]:
        return [Written(path.with_name(name.format(path.stem)), str(tree[key]), "make it again, with its .json")]

    return files


_KINDS: tuple[
    tuple[Callable[[Path, dict[str, Any]], bool], Callable[[Path, dict[str, Any]], list[Written]]], ...
] = (
    (lambda path, tree: path.name == "meta.json" and "splits" in tree, _tokens),
    (lambda path, tree: tree.get("kind") == STORE, lambda path, _: Datastore.open(path.parent).written()),
    (lambda path, tree: tree.get("kind") == ROWS, lambda path, _: written_shards(path.parent)),
    (lambda path, tree: path.name == "manifest.json" and "units" in tree and "hashes" not in tree, _units),
    (lambda path, tree: path.name == "losses.json", lambda path, _: written_losses(path)),
    (lambda path, tree: path.name == "unit.json", _arrays),
    (lambda path, tree: path.name == "index.json", lambda path, _: written_index(path.parent)),
    (lambda path, tree: path.name == "template.json", _beside("template.index", "template")),
    (lambda path, tree: path.name.startswith("part-") and "xxh3" in tree, _beside("{}.index", "xxh3")),
    (lambda path, tree: path.name.endswith(".index.json") and "xxh3" in tree, _beside("{}", "xxh3")),
    (lambda path, tree: path.name == "model.json" and "weights" in tree, _beside("model.safetensors", "weights")),
    (lambda path, tree: isinstance(tree.get("files"), dict), _marked),
)  # fmt: skip
"""What tells a record by its name and content, and the files that it names; the first that fits."""
