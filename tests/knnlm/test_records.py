"""The records of neighbours, cache, tuning and evaluation: files of older versions, and faults deep in a file.

What holds of every record alike is tested in tests/runtime/test_records.py.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.knn import files as old
from support.records import unsealed

from distlm.errors import DistlmError
from distlm.knnlm.cache.records import CacheManifest, CachePlan
from distlm.knnlm.evaluate.records import LossesFile, Results
from distlm.knnlm.search.records import (
    NeighboursManifest,
    NeighboursPlan,
    StatesManifest,
    StatesPlan,
    UnitFile,
)
from distlm.knnlm.tune.records import Tuned
from distlm.runtime.files import json_hash
from distlm.runtime.records import Record

UNITS = {"units": [old.UNIT]}
FILES: dict[type[Record], dict[str, Any]] = {
    NeighboursPlan: old.NEIGHBOURS, NeighboursManifest: old.NEIGHBOURS | UNITS, StatesPlan: old.STATES,
    StatesManifest: old.STATES | UNITS, UnitFile: old.UNIT, CachePlan: old.CACHE, CacheManifest: old.CACHE | UNITS,
    Tuned: old.TUNED, Results: old.all_results(), LossesFile: old.LOSSES,
}  # fmt: skip
EVERY = pytest.mark.parametrize("kind", FILES, ids=lambda kind: kind.__name__)


def write(path: Path, tree: Any) -> Path:
    path.write_text(json.dumps(tree), "utf-8")
    return path


def refused(kind: type[Record], path: Path, tree: Any) -> str:
    with pytest.raises(DistlmError) as caught:
        kind.read(write(path, tree))
    assert str(path) in str(caught.value)
    return str(caught.value)


@EVERY
def test_a_file_of_an_older_version_is_read_and_written_with_its_bytes(kind: type[Record], tmp_path: Path) -> None:
    """But for the format, which some had not yet: keys, their order and values are the same."""
    record = kind.read(write(tmp_path / "old.json", FILES[kind]))
    record.write(tmp_path / "new.json")
    again = unsealed(tmp_path / "new.json")
    assert json.dumps(again) == json.dumps({"format": 1, **FILES[kind]})
    kind.read(tmp_path / "new.json").write(tmp_path / "newer.json")
    assert (tmp_path / "newer.json").read_bytes() == (tmp_path / "new.json").read_bytes()


@EVERY
def test_a_wrong_type_anywhere_is_named(kind: type[Record], tmp_path: Path) -> None:
    for keys in leaves(FILES[kind]):
        tree = copy.deepcopy(FILES[kind])
        place: Any = tree
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = {"wrong": {}}
        said = refused(kind, tmp_path / "file.json", tree)
        # Of a map msgspec writes `...` for its keys, of a list the number of the element.
        names = [str(key) for key in keys if isinstance(key, str)]
        assert any(name in said for name in (names[-1], *names[-2:-1], "[...]")), (keys, said)


def leaves(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the numbers, texts, booleans and nulls of a tree stand; of lists only the first element."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*above, key))
    elif isinstance(value, list):
        if value:
            yield from leaves(value[0], (*above, 0))
    else:
        yield above


@pytest.mark.parametrize(
    ("kind", "keys", "gone"),
    [
        (Tuned, (), "temperature"), (Results, ("settings",), "k"), (Results, ("splits", "test"), "retrieved"),
        (Results, ("splits", "valid", "bootstrap"), "level"), (NeighboursManifest, ("self_test",), "found"),
    ],
)  # fmt: skip
def test_what_goes_together_is_asked_for(kind: type[Record], keys: tuple[str, ...], gone: str, tmp_path: Path) -> None:
    tree = copy.deepcopy(FILES[kind])
    place = tree
    for key in keys:
        place = place[key]
    del place[gone]
    assert f"missing field `{gone}`, which goes with" in refused(kind, tmp_path / "file.json", tree)


@pytest.mark.parametrize("mixture", ["knn", "cache", "both", "stores"])
def test_results_without_the_settings_of_a_mixture_are_refused(mixture: str, tmp_path: Path) -> None:
    tree = old.all_results()
    keys = ("lambda", "temperature", "k", "nprobe", "distances", "search") if mixture == "knn" else (mixture,)
    for key in keys:
        del tree["settings"][key]
    assert f"none of `{mixture}`" in refused(Results, tmp_path / "results.json", tree)


@pytest.mark.parametrize("field", ["datastore", "exactness", "self_test"])
def test_results_with_neighbours_say_of_which_store(field: str, tmp_path: Path) -> None:
    assert f"`{field}`" in refused(Results, tmp_path / "results.json", old.all_results() | {field: None})


def test_what_older_versions_did_not_write_may_be_absent(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    assert not Results.read(write(path, old.KNN_RESULTS)).ladder
    assert Results.read(path).mixtures() == ["lm", "knn"]
    alone = Tuned.read(write(path, {**old.TUNED_LM, "cache": old.TUNED_CACHE}))
    assert not alone.grid and alone.cache
    tree = copy.deepcopy(old.TUNED_KNN | old.TUNED_LM)
    del tree["grid"]["buckets"]
    assert Tuned.read(write(path, tree)).tree() == {"format": 1, **tree}


def test_fingerprints_are_those_of_older_versions(tmp_path: Path) -> None:
    """They are in knn.json and results.json of runs that were made long ago; only knn.json had no format."""
    assert Tuned.read(write(tmp_path / "knn.json", old.TUNED)).fingerprint == json_hash(old.TUNED)
    assert Tuned.read(write(tmp_path / "knn.json", {"format": 1, **old.TUNED})).fingerprint == json_hash(old.TUNED)
    for kind in (NeighboursManifest, StatesManifest, CacheManifest):
        assert json_hash(kind.read(write(tmp_path / "a.json", FILES[kind])).tree()) == json_hash(FILES[kind])
