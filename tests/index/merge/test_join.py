"""Merging files that stock faiss wrote: the bytes of a one-process build, and refusals where faiss merges silently."""

import filecmp
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from support import distlm
from support.index import vectors, without_polysemous
from support.threads import ThreadComm, on_threads

from distlm.cli import main
from distlm.errors import DistlmError, UsageError
from distlm.index.merge import part_file
from distlm.index.merge.join import Ids, join_indexes, natural_order
from distlm.index.merge.part_file import open_part, part_ids
from distlm.index.records import JoinRecord
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.stop import StopFlag

ROWS = 3000
FACTORIES = ["IVF32,PQ4", "IVF32,SQ8", "IVF32,Flat", "PCA16,IVF32,PQ8x4", "IVF32_HNSW8,RaBitQ"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """faiss's threads wait for each other by spinning, which costs other tests their cores."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@cache
def trained(factory: str, seed: int = 0, width: int = 32, metric: int = faiss.METRIC_L2) -> Any:
    index = without_polysemous(faiss.index_factory(width, factory, metric))
    index.train(vectors(2000, width, seed).astype(np.float32))
    return index


def added(index: Any, ids: np.ndarray, out: Path) -> Path:
    """A copy of `index` with the keys of these ids, as a file."""
    copy = faiss.clone_index(index)
    copy.add_with_ids(KEYS[ids], np.arange(len(ids)) if "local" in out.name else ids)
    faiss.write_index(copy, str(out))
    return out


KEYS = vectors(ROWS, seed=1).astype(np.float32)
EDGES = [(0, 700), (700, 1900), (1900, 1900), (1900, ROWS)]
"""Keys of each part; one has none."""


def parts_of(index: Any, folder: Path, name: str = "part") -> list[Path]:
    return [added(index, np.arange(*edge), folder / f"{name}-{place}.index") for place, edge in enumerate(EDGES)]


def whole(index: Any, folder: Path) -> Path:
    return added(index, np.arange(ROWS), folder / "one.index")


def merge(parts: Sequence[Path], out: Path, ids: Ids = "keep", gaps: bool = False, unit: int = 20_000) -> JoinRecord:
    with StopFlag() as stop:
        return join_indexes(SingleComm(), stop, parts, out, ids, gaps, unit)


@pytest.mark.parametrize("factory", FACTORIES)
def test_it_is_what_one_process_writes(factory: str, tmp_path: Path) -> None:
    index = trained(factory)
    parts, one = parts_of(index, tmp_path), whole(index, tmp_path)
    before = [path.read_bytes() for path in parts]
    found = merge(parts, tmp_path / "merged.index")
    assert filecmp.cmp(one, tmp_path / "merged.index", shallow=False)
    assert found.rows == ROWS and found.self_found > 0.9
    assert [path.read_bytes() for path in parts] == before
    opened = faiss.read_index(str(tmp_path / "merged.index"), faiss.IO_FLAG_MMAP)
    assert opened.ntotal == ROWS


def test_any_order_of_parts_makes_the_same_file(tmp_path: Path) -> None:
    index = trained("IVF32,PQ8x4")
    parts, one = parts_of(index, tmp_path), whole(index, tmp_path)
    merge(parts[::-1], tmp_path / "merged.index")
    assert filecmp.cmp(one, tmp_path / "merged.index", shallow=False)


def test_local_ids_are_shifted_when_told(tmp_path: Path) -> None:
    index = trained("IVF32,PQ8x4")
    one = whole(index, tmp_path)
    merge(parts_of(index, tmp_path, "local"), tmp_path / "merged.index", "shift", unit=500)
    assert filecmp.cmp(one, tmp_path / "merged.index", shallow=False)


def test_another_nprobe_or_direct_map_is_no_other_index(tmp_path: Path) -> None:
    index = trained("IVF32,PQ8x4")
    parts = parts_of(index, tmp_path)
    other: Any = faiss.read_index(str(parts[1]))
    other.nprobe = 16
    faiss.write_index(other, str(parts[1]))
    mapped: Any = faiss.read_index(str(parts[2]))
    mapped.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]
    faiss.write_index(mapped, str(parts[2]))
    merge(parts, tmp_path / "merged.index")
    assert filecmp.cmp(whole(index, tmp_path), tmp_path / "merged.index", shallow=False)


def other_codebook(index: Any) -> Any:
    copy = faiss.clone_index(index)
    inner: Any = faiss.downcast_index(faiss.extract_index_ivf(copy))
    centroids = faiss.vector_to_array(inner.pq.centroids)
    faiss.copy_array_to_vector(centroids[::-1].copy(), inner.pq.centroids)
    return copy


def other_ranges(index: Any) -> Any:
    copy: Any = faiss.clone_index(index)
    faiss.copy_array_to_vector(faiss.vector_to_array(copy.sq.trained) * np.float32(1.1), copy.sq.trained)
    return copy


def other_residual(index: Any) -> Any:
    copy: Any = faiss.clone_index(index)
    copy.by_residual = False
    return copy


def other_rotation(index: Any) -> Any:
    copy: Any = faiss.clone_index(index)
    matrix: Any = faiss.downcast_VectorTransform(copy.chain.at(0))
    faiss.copy_array_to_vector(-faiss.vector_to_array(matrix.A), matrix.A)
    return copy


@pytest.mark.parametrize(
    ("factory", "change", "said"),
    [
        ("IVF32,PQ8x4", other_codebook, "another product-quantiser codebook on the same centroids"),
        ("IVF32,PQ8x4", lambda _index: trained("IVF32,PQ8x4", seed=9), "other coarse centroids"),
        ("IVF32,SQ8", other_ranges, "other scalar-quantiser ranges on the same centroids"),
        ("IVF32,PQ8x4", other_residual, "by_residual False instead of True"),
        ("PCA16,IVF32,PQ8x4", other_rotation, r"another transform \(PCA, OPQ\)"),
        (
            "IVF32,PQ8x4",
            lambda _index: trained("IVF32,PQ8x4", metric=faiss.METRIC_INNER_PRODUCT),
            "metric 0 instead of 1",
        ),
        ("IVF32,PQ8x4", lambda _index: trained("IVF16,PQ8x4"), "lists 16 instead of 32"),
        ("IVF32,PQ8x4", lambda _index: trained("IVF32,PQ4x4"), "code size 2 instead of 4"),
        ("IVF32,PQ8x4", lambda _index: trained("IVF32,SQ8"), "type .*IndexIVFScalarQuantizer"),
    ],
)
def test_another_trained_state_is_refused(
    factory: str, change: Callable[[Any], Any], said: str, tmp_path: Path
) -> None:
    index = trained(factory)
    parts = parts_of(index, tmp_path)
    added(change(index), np.arange(*EDGES[1]), parts[1])
    with pytest.raises(DistlmError, match=f"part-1.index: another trained index than .*part-0.index .*{said}"):
        merge(parts, tmp_path / "merged.index")
    assert not (tmp_path / "merged.index").exists()


def test_another_width_is_refused(tmp_path: Path) -> None:
    parts = parts_of(trained("IVF32,PQ8x4"), tmp_path)
    faiss.write_index(trained("IVF32,PQ8x4", width=16), str(parts[1]))
    with pytest.raises(DistlmError, match="width 16 instead of 32"):
        merge(parts, tmp_path / "merged.index")


def test_ids_that_do_not_number_the_keys_are_refused(tmp_path: Path) -> None:
    index = trained("IVF32,PQ8x4")
    parts, local = parts_of(index, tmp_path), parts_of(index, tmp_path, "local")
    out = tmp_path / "merged.index"
    copy = Path(shutil.copy(parts[0], tmp_path / "copy.index"))
    for given, ids, said in (
        (local, "keep", r"the id \d+ is in .*local-0.index and in .*local-1.index.*use --ids shift"),
        ([*parts, copy], "keep", r"the id \d+ is in .*part-0.index and in .*copy.index; the files are copies"),
        (parts[:3], "keep", r""),
        (parts[1:], "keep", r"has the id 2\d+ among 2300 keys in all; a file is missing"),
        (parts, "shift", r"part-1.index: --ids shift is for files that number their own 1200 keys.*use --ids keep"),
    ):
        if not said:
            # The last file is missing: what is left numbers its keys without a gap.
            assert merge(given, tmp_path / "three.index").rows == 1900
            continue
        with pytest.raises(DistlmError, match=said):
            merge(given, out, ids)  # type: ignore[arg-type]
    with pytest.raises(DistlmError, match=r"part-0.index twice"):
        merge([parts[0], parts[0]], out)
    assert not out.exists()


def test_gaps_are_taken_when_told(tmp_path: Path) -> None:
    index = trained("IVF32,PQ8x4")
    even = added(index, np.arange(0, ROWS, 2), tmp_path / "even.index")
    with pytest.raises(DistlmError, match=r"has the id 2\d+ among 1500 keys"):
        merge([even], tmp_path / "merged.index")
    assert merge([even], tmp_path / "merged.index", gaps=True).rows == ROWS // 2
    spread: Any = faiss.clone_index(index)
    spread.add_with_ids(KEYS, np.arange(ROWS) * 10**6)
    far = tmp_path / "far.index"
    faiss.write_index(spread, str(far))
    # Not the advice that was followed.
    with pytest.raises(DistlmError, match=r"has the id \d+ among 3000 keys .*\(with --gaps at most \d+\)"):
        merge([far], tmp_path / "other.index", gaps=True)


def test_vectors_of_nan_are_named(tmp_path: Path) -> None:
    index: Any = faiss.clone_index(trained("IVF32,PQ8x4"))
    vectors = np.zeros((10, 32), np.float32)
    vectors[4] = np.nan
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "part.index"))
    with pytest.raises(DistlmError, match=r"its lists hold 9 keys, its head says 10: faiss counts vectors with NaN"):
        merge([tmp_path / "part.index"], tmp_path / "merged.index")


def test_a_missing_number_in_the_middle_is_named(tmp_path: Path) -> None:
    index = trained("IVF32,PQ8x4")
    parts = [added(index, np.arange(10), tmp_path / "a.index"), added(index, np.arange(11, 20), tmp_path / "b.index")]
    with pytest.raises(DistlmError, match="has the id 19 among 19 keys"):
        merge(parts, tmp_path / "merged.index")


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: trained("IVF32,PQ8x4fs"), "IndexIVFPQFastScan packs codes in blocks of 32"),
        (lambda: faiss.IndexFlatL2(32), "IndexFlatL2 has no inverted lists"),
        (lambda: faiss.IndexIDMap(faiss.IndexFlatL2(32)), "IndexIDMap keeps its ids outside the lists"),
        (lambda: trained("IVF8,PQ2+2"), "IndexIVFPQR keeps second codes outside the lists"),
        (lambda: faiss.index_factory(32, "HNSW8"), "IndexHNSWFlat has no inverted lists"),
    ],
)
def test_types_that_cannot_be_merged_are_refused_by_name(build: Callable[[], Any], said: str, tmp_path: Path) -> None:
    faiss.write_index(build(), str(tmp_path / "a.index"))
    with pytest.raises(DistlmError, match=said):
        merge([tmp_path / "a.index"], tmp_path / "merged.index")


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    parts = parts_of(trained("IVF32,PQ8x4"), tmp_path)
    data = parts[1].read_bytes()
    for offset in np.linspace(0, len(data) - 1, 20).astype(int):
        parts[1].write_bytes(data[:offset])
        with pytest.raises(DistlmError, match=r"part-1.index: "):
            merge(parts, tmp_path / "merged.index")
    parts[1].write_bytes(data + b"more")
    with pytest.raises(DistlmError, match=r"part-1.index: does not end with its inverted lists"):
        merge(parts, tmp_path / "merged.index")
    assert not (tmp_path / "merged.index").exists()


def test_an_order_that_a_shell_makes_is_refused_for_shifted_ids(tmp_path: Path) -> None:
    index = trained("IVF32,PQ8x4")
    names = [tmp_path / f"local_{number}.index" for number in range(12)]
    for place, path in enumerate(names):
        added(index, np.arange(place * 100, place * 100 + 100), path)
    assert natural_order(sorted(names)) == names
    with pytest.raises(DistlmError, match=r"local_10.index stands where .*local_2.index is expected"):
        merge(sorted(names), tmp_path / "merged.index", "shift")
    assert merge(names, tmp_path / "merged.index", "shift").rows == 1200


def test_the_order_of_names_that_say_none_is_the_user_s(tmp_path: Path) -> None:
    index = trained("IVF32,SQ8")
    for number in (1, 2):
        (tmp_path / f"run{number}").mkdir()
    wiki, books, one, two = (
        added(index, np.arange(first, first + 50), tmp_path / name)
        for first, name in ((0, "wiki-local.index"), (50, "books-local.index"), (100, "run1/local.index"),
                            (150, "run2/local.index"))
    )  # fmt: skip
    merge([wiki, one, books, two], tmp_path / "merged.index", "shift")
    merged: Any = faiss.read_index(str(tmp_path / "merged.index"))
    merged.nprobe = 32
    places = merged.search(KEYS[[0, 49, 100, 50, 150, 199]], 1)[1][:, 0]
    assert places.tolist() == [0, 49, 50, 100, 150, 199]
    with pytest.raises(DistlmError, match=rf"{two} stands where {one} is expected .* or, if this is it, rename them"):
        merge([wiki, two, books, one], tmp_path / "other.index", "shift")


@pytest.mark.parametrize("step", [6, 2])
def test_ranks_find_gaps_and_copies_as_one_process_does(step: int, tmp_path: Path) -> None:
    """Of files whose ids lie among each other, which are read before, and of files that follow one another."""
    index = trained("IVF32,SQ8")
    firsts, count = ((0, 2, 4), ROWS) if step == 6 else ((0, 1000, 2000), 900)
    ids = [np.arange(first, min(first + count, ROWS), step) for first in firsts]
    parts = [added(index, of, tmp_path / f"{number}.index") for number, of in enumerate(ids)]
    one, out = tmp_path / "one.index", tmp_path / "out.index"
    merge(parts, one, gaps=True)

    def join(paths: list[Path], out: Path) -> list[JoinRecord | DistlmError]:
        def of_rank(comm: ThreadComm) -> JoinRecord | DistlmError:
            try:
                return join_indexes(comm, StopFlag(comm.rank), paths, out, "keep", True, 20_000)
            except DistlmError as error:
                return error

        return on_threads(3, of_rank)

    found = join(parts, out)
    assert all(isinstance(of, JoinRecord) for of in found), found
    assert filecmp.cmp(one, out, shallow=False)
    again = added(index, ids[2][:5], tmp_path / "again.index")
    refused = join([*parts, again], tmp_path / "none.index")
    assert all(f"is in {parts[2]} and in {again}" in str(of) for of in refused), refused


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    parts = parts_of(trained("IVF32,PQ8x4"), tmp_path)
    with pytest.raises(DistlmError, match="is there already"):
        merge(parts, parts[0])
    with pytest.raises(DistlmError, match="no such file"):
        merge([tmp_path / "none.index"], tmp_path / "merged.index")
    with pytest.raises(DistlmError, match=r"the folder .*nowhere does not exist"):
        merge(parts, tmp_path / "nowhere" / "merged.index")
    with pytest.raises(UsageError, match="name the files"):
        merge([], tmp_path / "merged.index")


def test_ids_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = open_part(parts_of(trained("IVF32,PQ8x4"), tmp_path)[1])
    monkeypatch.setattr(part_file, "READ_BYTES", 640)
    whole_lists = list(part_ids(part))
    monkeypatch.setattr(part_file, "LONG_LIST", 0)
    ids_alone = list(part_ids(part))
    assert len(whole_lists) > 10 and len(ids_alone) > 10
    for pieces in (whole_lists, ids_alone):
        assert sorted(np.concatenate(pieces)) == list(range(700, 1900))


def test_a_dry_run_writes_nothing_and_says_how_much(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parts = parts_of(trained("IVF32,PQ8x4"), tmp_path)
    words = ["index", "merge", "--parts", *map(str, parts), "--out", str(tmp_path / "merged.index"), "--dry-run"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    said = capfd.readouterr().out
    assert "part-1.index: 1200 keys, ids kept" in said and "3000 keys, 32 lists" in said
    assert not (tmp_path / "merged.index").exists()


@pytest.mark.multiprocess
def test_ranks_write_the_same_file(tmp_path: Path) -> None:
    index = trained("IVF32,PQ8x4")
    parts, one = parts_of(index, tmp_path), whole(index, tmp_path)
    for ranks in (1, 3):
        out = tmp_path / f"merged-{ranks}.index"
        said = distlm("index", "merge", "--parts", *map(str, parts), "--out", str(out), ranks=ranks).stdout
        assert filecmp.cmp(one, out, shallow=False) and said.count("rows=3000") == 1
    again = distlm(
        "index", "merge", "--parts", *map(str, parts), str(one), "--out", str(tmp_path / "x"), ranks=2, check=False
    )
    assert again.returncode == 1 and again.stderr.count("distlm: the id ") == 1
