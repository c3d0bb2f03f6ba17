"""Units of a merge are ranges of bytes, whose edges may lie in a code, in an id, or in the head of the file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.index import config, one_rank, vectors, write_store

from distlm.errors import DistlmError
from distlm.index import run_index_add, run_index_merge, run_index_train
from distlm.index.layout import IndexFolder, list_sums, lists_header
from distlm.index.merge import write
from distlm.index.merge.check import SumCheck
from distlm.index.merge.copy import MergeLayout, assemble, unit_ids
from distlm.index.merge.join import join_indexes
from distlm.index.records import JoinRecord, PartRecord
from distlm.runtime.files import PiecesHasher, bytes_hash, file_hash, join_hashes
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.stop import StopFlag

HEAD = b"a trained index"


class Parts:
    """Parts of random codes as files, their layout, and the file that they make."""

    def __init__(self, folder: Path, seed: int, shifted: bool) -> None:
        random = np.random.default_rng(seed)
        parts, nlist, width = int(random.integers(1, 5)), int(random.integers(1, 9)), int(random.integers(1, 6))
        sizes = random.integers(0, 5, (parts, nlist)) * random.integers(0, 2, (parts, nlist))
        codes = [[random.integers(0, 256, (n, width), np.uint8).tobytes() for n in row] for row in sizes]
        rows = sizes.sum(axis=1)
        firsts = [0, *np.cumsum(rows)[:-1].tolist()]
        orders = [random.permutation(n) + (0 if shifted else first) for n, first in zip(rows, firsts, strict=True)]
        ids = [np.split(of, np.cumsum(row)[:-1]) for of, row in zip(orders, sizes, strict=True)]
        paths, starts = [], []
        for part in range(parts):
            start = HEAD + lists_header(sizes[part], width)
            lists = [codes[part][one] + ids[part][one].astype("<i8").tobytes() for one in range(nlist)]
            paths.append(folder / f"{seed}-{part}")
            paths[-1].write_bytes(start + b"".join(lists))
            starts.append(len(start))
        self.shifts = tuple(firsts) if shifted else ()
        self.layout = MergeLayout(HEAD, tuple(starts), tuple(paths), sizes, width, self.shifts)
        moved = [[piece + (self.shifts[part] if shifted else 0) for piece in ids[part]] for part in range(parts)]
        self.whole = HEAD + lists_header(sizes.sum(axis=0), width) + b"".join(
            b"".join(codes[part][one] for part in range(parts))
            + b"".join(moved[part][one].astype("<i8").tobytes() for part in range(parts))
            for one in range(nlist)
        )  # fmt: skip
        self.ids = [np.concatenate(of) for of in moved]


@pytest.mark.parametrize("shifted", [False, True])
def test_units_of_any_size_make_the_file_and_show_each_id_once(shifted: bool, tmp_path: Path) -> None:
    for seed in range(12):
        parts = Parts(tmp_path, seed, shifted)
        for size in (1, 3, 7, 8, 13, 50, 1000):
            units = parts.layout.units(size)
            assert all(low % size == 0 and 0 < high - low <= size for low, high in units)
            found: list[list[int]] = [[] for _ in parts.ids]
            whole = b""
            for low, high in units:
                buffer = np.full(size, 255, np.uint8)
                data = assemble(parts.layout, low, high, buffer)
                whole += data.tobytes()
                for part, ids in unit_ids(parts.layout, low, high, data):
                    found[part] += ids.tolist()
            assert whole == parts.whole
            assert [sorted(of) for of in found] == [sorted(of.tolist()) for of in parts.ids]


def test_the_checksum_of_pieces_is_that_of_the_bytes_in_order(tmp_path: Path) -> None:
    data = bytes(range(256)) * 3
    (tmp_path / "file").write_bytes(data)
    for size in (1, 10, 256, 768, 1000):
        known = join_hashes([bytes_hash(data[low : low + size]) for low in range(0, len(data), size)], size)
        assert known.startswith(f"{size}_") and file_hash(tmp_path / "file", known) == known
        for step in (1, 7, 256, 768):
            hasher = PiecesHasher(size)
            for low in range(0, len(data), step):
                hasher.update(data[low : low + step])
            assert hasher.hexdigest() == known
        assert file_hash(tmp_path / "file", known.replace("_", "_0")) == known
        (tmp_path / "other").write_bytes(data[:-1] + b"!")
        assert file_hash(tmp_path / "other", known) != known
    assert file_hash(tmp_path / "file", "0" * 32) == file_hash(tmp_path / "file") == bytes_hash(data)


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("added")
    write_store(folder / "datastore", vectors(1200, 8), rows_per_shard=500)
    with one_rank(config(folder, factory="IVF8,SQ8")) as stage:
        run_index_train(stage)
        run_index_add(stage)
    return folder


def test_a_byte_of_a_part_that_rotted_is_found_while_it_is_copied(added: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = IndexFolder(added / "index")
    part, sidecar = folder.part(1), PartRecord.read(folder.part_json(1))
    assert isinstance(sidecar.lists, str) and len(sidecar.lists) == 8 * 16
    data = part.read_bytes()
    body = len(data) - sidecar.rows * 16
    places = [*range(body, len(data), 997), len(data) - 1]
    for unit in (700, 4096, 1 << 20):
        monkeypatch.setattr("distlm.index.merge.stage.UNIT_BYTES", unit)
        for place in places[:: 1 if unit == 4096 else 4]:
            part.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
            with (
                one_rank(config(added, factory="IVF8,SQ8")) as stage,
                pytest.raises(DistlmError, match=r"part-00001.index: damaged: lists .* remove part-00001.json and run"),
            ):
                run_index_merge(stage)
            assert not folder.merged.exists()
    part.write_bytes(data)
    # A sidecar from before lists had checksums: the part is read once more for it.
    old = PartRecord.read(folder.part_json(1))
    old.lists = type(old).__struct_defaults__[-1]
    old.write(folder.part_json(1))
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 16]))
    with one_rank(config(added, factory="IVF8,SQ8")) as stage:
        with pytest.raises(DistlmError, match=r"part-00001.index: damaged \(checksum"):
            run_index_merge(stage)
        part.write_bytes(data)
        assert run_index_merge(stage)["rows"] == 1200


def test_many_lists_have_checksums_in_groups(added: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    monkeypatch.setattr("distlm.index.layout.SUMS", 3)
    paths = [IndexFolder(added / "index").part(shard) for shard in range(3)]
    indexes: list[Any] = [faiss.read_index(str(path)) for path in paths]
    sizes = np.array([[index.invlists.list_size(one) for one in range(8)] for index in indexes])
    starts = tuple(path.stat().st_size - int(row.sum()) * 16 for path, row in zip(paths, sizes, strict=True))
    layout = MergeLayout(HEAD, starts, tuple(paths), sizes, 8)
    sums = [list_sums(index) for index in indexes]
    assert [len(of) for of in sums] == [3 * 16] * 3
    for size in (400, 5000, 1 << 20):
        for right in (True, False):
            # The last group, of two lists.
            of = sums if right else [sums[0], sums[1], sums[2][:-1] + ("0" if sums[2][-1] != "0" else "1")]
            check = SumCheck(of, ["mend it"] * 3)

            def look(check: SumCheck = check, size: int = size) -> None:
                for low, high in layout.units(size):
                    check.unit(layout, low, high, assemble(layout, low, high, np.empty(size, np.uint8)), copied=True)

            if right:
                look()
            else:
                with pytest.raises(DistlmError, match=r"part-00002.index: damaged: lists 6 to 7 do not .*; mend it"):
                    look()


def test_an_order_that_the_ends_of_lists_do_not_show(
    added: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least id of the second file stands in the middle of a list: by the ends it comes last."""
    import faiss

    empty: Any = faiss.read_index(str(IndexFolder(added / "index").template))
    keys = vectors(40, 8).astype(np.float32)
    places = empty.quantizer.search(keys, 1)[1].ravel()
    busy = np.flatnonzero(places == np.bincount(places).argmax())
    assert len(busy) >= 4
    one = np.array([5, 6, 7, 8][: len(busy[:4])])
    first, second = faiss.clone_index(empty), faiss.clone_index(empty)
    first.add_with_ids(keys[busy[:4]], one)
    second.add_with_ids(keys[busy[:3]], np.array([9, 0, 10]))
    rest = faiss.clone_index(empty)
    rest.add_with_ids(keys[:4], np.array([1, 2, 3, 4]))
    paths = [tmp_path / f"{name}.index" for name in ("first", "second", "rest")]
    for index, path in zip((first, second, rest), paths, strict=True):
        faiss.write_index(index, str(path))
    written = []
    real = write.write_unit

    def counted(*of: Any) -> Any:
        written.append(of)
        return real(*of)

    monkeypatch.setattr(write, "write_unit", counted)
    with StopFlag() as stop:
        record = join_indexes(SingleComm(), stop, paths, tmp_path / "all.index", "keep")
    assert len(written) == 2, "written once more, in the right order"
    assert [Path(part.path).stem for part in record.parts] == ["second", "rest", "first"]
    assert JoinRecord.read(tmp_path / "all.index.json").xxh3 == file_hash(tmp_path / "all.index", record.xxh3)
    merged: Any = faiss.read_index(str(tmp_path / "all.index"))
    number = int(places[busy[0]])
    ids = faiss.rev_swig_ptr(merged.invlists.get_ids(number), merged.invlists.list_size(number))
    assert ids[:3].tolist() == [9, 0, 10]
