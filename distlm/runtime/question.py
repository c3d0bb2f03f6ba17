"""Which files of a run answer a question: an index has a name, a search a label, and older versions' folders count too.

RUN/index/NAME/                       one index; NAME from index.factory, e.g. IVF4096-PQ64, auto, auto-40B
RUN/neighbours/LABEL/SPLIT/           one search, e.g. IVF4096-PQ64_nprobe32_exact_k1024, brute_k64
RUN/tuned/LABEL.json  results/LABEL.json  losses/LABEL/

Up to version 0.1 a run had one index and one search: RUN/index, neighbours/SPLIT, knn.json, results.json, losses. They
answer the question that they were made for.
"""

import glob
import re
from pathlib import Path

from distlm.config.load import load_config
from distlm.config.schema import IndexConfig, KnnConfig, RunConfig
from distlm.runtime.files import atomic_path, json_of

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9.]+")
# Names of indexes may have parts that look like these, so a label is read from its end.
_ASKED = re.compile(r"(?:(.*)_)?(?:nprobe\d+_(?:exact|quantised)|brute)(?:_dot)?(?:_c\d+)?_k\d+")
_MANIFEST, _PLAN = "manifest.json", "plan.json"


def index_name(index: IndexConfig) -> str:
    """Name of an index: index.name, or that of its folder, or from the factory."""
    if index.name or index.folder:
        return index.name or Path(index.folder).name
    limits = [f"{index.max_bytes_per_key}B"] if index.max_bytes_per_key else []
    limits += [f"{index.max_memory:g}GB"] if index.max_memory else []
    return _NOT_IN_NAMES.sub("-", "-".join([index.factory, *limits])).strip("-")


def label(config: RunConfig) -> str:
    """Name of the question that the sections index and knn ask."""
    return f"{_stem(config)}_k{config.knn.k}"


def index_of(label: str) -> str:
    """Name of the index in a label; empty for brute force without index.name, and for what is no label."""
    found = _ASKED.fullmatch(label)
    return found[1] or "" if found else ""


def asked_of_search(knn: KnnConfig) -> dict[str, object]:
    """Field of a search's manifest → its value for this question. k is left out: a search for more answers, too."""
    brute = knn.search == "brute"
    return {
        "search": knn.search, "nprobe": None if brute else knn.nprobe,
        "distances": "exact" if brute else knn.distances, "similarity": knn.similarity,
    }  # fmt: skip


def index_folder(root: Path, config: RunConfig) -> Path:
    """Where the index lies, or will lie."""
    if config.index.folder:
        return Path(config.index.folder)
    old, named = root / "index", root / "index" / index_name(config.index)
    before = _facts(old / "template.json").get("factory_asked")
    return old if before == config.index.factory and not config.index.name and not named.exists() else named


def neighbours_folder(root: Path, config: RunConfig, split: str) -> Path:
    """Where the neighbours of a split lie, or will lie."""
    if config.knn.folder:
        return Path(config.knn.folder) / split
    named = root / "neighbours" / label(config) / split
    return (
        root / "neighbours" / split
        if not named.exists() and _kept_before(root, config, split) == config.knn.k
        else named
    )


def kept_neighbours(root: Path, config: RunConfig, split: str) -> Path:
    """The finished neighbours that answer the question: its own, or those of a larger k; where its own will lie when
    there are none.

    By dot product the first of more neighbours are not those that a search for fewer finds: its own alone answer.
    """
    own = neighbours_folder(root, config, split)
    if config.knn.folder or config.knn.similarity == "dot" or (own / _MANIFEST).is_file():
        return own
    larger, stem = {}, f"{_stem(config)}_k"
    for path in (root / "neighbours").glob(f"{glob.escape(stem)}*/{glob.escape(split)}/{_MANIFEST}"):
        # What another index's name makes longer is no number.
        if (k := path.parts[-3].removeprefix(stem)).isdigit():
            larger[int(k)] = path.parent
    old = root / "neighbours" / split
    if (old / _MANIFEST).is_file():
        larger.setdefault(_kept_before(root, config, split), old)
    return min(((k, folder) for k, folder in larger.items() if k > config.knn.k), default=(0, own))[1]


def answer(root: Path, config: RunConfig, folder: str, old: str) -> Path:
    """RUN/FOLDER/LABEL.json, or RUN/OLD where an older version has written that."""
    return root / old if (root / old).exists() and not (root / folder).exists() else own_answer(root, config, folder)


def keep_old_answers(root: Path) -> None:
    """Give the answers of an older version their label, before the next question's become the newest."""
    asked = root / "configs" / "knn.yaml"
    pairs = ((root / "tuned", root / "knn.json"), (root / "results", root / "results.json"))
    old = [(folder, path) for folder, path in pairs if path.is_file() and not folder.exists()]
    if not old or not asked.is_file():
        return
    name = f"{label(load_config(str(asked)))}.json"
    for folder, path in old:
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(path.read_bytes())


def own_answer(root: Path, config: RunConfig, folder: str) -> Path:
    """RUN/FOLDER/LABEL.json."""
    return root / folder / f"{label(config)}.json"


def _stem(config: RunConfig) -> str:
    knn = config.knn
    dot = ["dot"] if knn.similarity == "dot" else []
    if knn.search == "brute":
        return "_".join([*filter(None, [config.index.name]), "brute", *dot])
    more = [f"c{knn.candidates}"] if knn.candidates else []
    return "_".join([index_name(config.index), f"nprobe{knn.nprobe}", knn.distances, *dot, *more])


def _kept_before(root: Path, config: RunConfig, split: str) -> int:
    """k of the neighbours that an older version kept, or began, for this question; 0 without."""
    folder, knn = root / "neighbours" / split, config.knn
    facts = _facts(folder / _MANIFEST) or _facts(folder / _PLAN)
    asked = asked_of_search(knn)
    if (
        knn.candidates > knn.k
        or not facts
        or {"similarity": "l2", **{key: facts.get(key) for key in asked if key in facts}} != asked
    ):
        return 0
    # Which index they were found in, their files say by its hash alone.
    of_it = (
        knn.search == "brute"
        or index_folder(root, config) == root / "index"
        or not (root / "index" / "template.json").exists()
    )
    kept = facts.get("k")
    return kept if of_it and isinstance(kept, int) else 0


def _facts(path: Path) -> dict[str, object]:
    """A JSON object; empty where there is none that can be read, which its reader will say."""
    try:
        found = json_of(path.read_text("utf-8")) if path.is_file() else {}
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
