import shutil
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import write_text
from support.deadline import until
from support.shards import make_shards, manifest

from distlm.data.shards import reader
from distlm.data.shards.order import ShardOrder, rank_places
from distlm.data.shards.reader import QUEUE, RowBatch, RowStream, ShardRows, verify_shards
from distlm.errors import DistlmError
from distlm.models.plm.text.masking import NO_LABEL, mask_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished shards; tests that change them take a copy."""
    folder = tmp_path_factory.mktemp("reader")
    make_shards(folder / "run", write_text(folder / "text", train_lines=2000), shard_text=10_000, chunk_rows=8)
    return folder / "run/shards"


@pytest.fixture(scope="module")
def train(made: Path) -> ShardRows:
    rows = ShardRows.open(made, "train")
    # More chunks than one pool has.
    assert len(rows.chunk_rows) > 140 and len(manifest(made)["splits"]["train"]["shards"]) > 3
    return rows


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "shards")
    return tmp_path / "shards"


def test_plain_webdataset_reads_the_shards(made: Path, train: ShardRows) -> None:
    webdataset = pytest.importorskip("webdataset")
    count = len(manifest(made)["splits"]["train"]["shards"])
    urls = f"{made}/train-{{00000..{count - 1:05d}}}.tar"
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [len(sample["npy"]) for sample in samples] == train.chunk_rows.tolist()
    assert samples[0]["__key__"] == "train-00000-00000" and samples[0]["npy"].dtype == np.uint16
    assert np.array_equal(np.concatenate([sample["npy"] for sample in samples]), train.rows(np.arange(len(train))))


def test_rows_by_number_in_any_order(train: ShardRows) -> None:
    whole = train.rows(np.arange(len(train)))
    assert whole.dtype == np.int32 and whole.shape == (len(train), 16)
    numbers = np.random.default_rng(0).integers(0, len(train), 300)
    assert np.array_equal(train.rows(numbers), whole[numbers])
    assert train.rows([]).shape == (0, 16)
    for number in (-1, len(train)):
        with pytest.raises(IndexError):
            train.rows([number])


def test_an_epoch_has_every_row_once_and_the_rows_are_those_of_their_numbers(train: ShardRows) -> None:
    whole, per_update = train.rows(np.arange(len(train))), 60
    updates = -(-2 * len(train) // per_update)
    batches = [train.rows_for_update(3, update, per_update) for update in range(updates)]
    numbers, epochs = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("rows", "epochs"))
    for epoch in (0, 1):
        assert np.array_equal(np.sort(numbers[epochs == epoch]), np.arange(len(train)))
    assert np.array_equal(np.concatenate([batch.tokens for batch in batches]), whole[numbers])
    assert np.array_equal(numbers, ShardOrder(train.chunk_rows, 3).rows_at(np.arange(len(numbers)))[1])
    assert any(len(np.unique(batch.epochs)) == 2 for batch in batches), "an update lies across the end of an epoch"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_together_read_what_one_reads(made: Path, train: ShardRows, ranks: int) -> None:
    for update in (0, 37, 58):
        whole = train.rows_for_update(1, update, 48)
        parts = []
        for rank in range(ranks):
            places = rank_places(48, 24, rank, ranks)
            mine = ShardRows.open(made, "train").rows_for_update(1, update, 48, places)
            assert np.array_equal(mine.tokens, whole.tokens[places])
            assert np.array_equal(mine.epochs, whole.epochs[places])
            parts.append((places, mine.rows))
        rows = np.empty(48, np.int64)
        for places, numbers in parts:
            rows[places] = numbers
        assert np.array_equal(rows, whole.rows)


def masked(batch: RowBatch, rows: ShardRows) -> tuple[np.ndarray, np.ndarray]:
    return mask_rows(batch.tokens, batch.rows, batch.epochs, 7, rows.tokenizer)


def test_a_stream_begun_at_any_update_goes_on_as_one_from_the_start(made: Path, train: ShardRows) -> None:
    """Masks included, on another number of ranks."""
    with RowStream(train, 7, 0, 60, None, lambda batch: masked(batch, train)) as stream:
        expected = [next(stream) for _ in range(60)]
    for start, ranks in ((1, 1), (29, 3), (41, 2), (57, 5)):
        fresh = ShardRows.open(made, "train")
        for rank in range(ranks):
            places = rank_places(60, 60, rank, ranks)
            with RowStream(fresh, 7, start, 60, places, partial(masked, rows=fresh)) as stream:
                for update in range(start, 60):
                    for ours, theirs in zip(next(stream), expected[update], strict=True):
                        assert np.array_equal(ours, theirs[places])


def test_masks_change_from_epoch_to_epoch(train: ShardRows) -> None:
    tokens = train.rows([5])
    (first, second) = (mask_rows(tokens, [5], epoch, 7, train.tokenizer, 0.5)[1] for epoch in (0, 1))
    assert not np.array_equal(first != NO_LABEL, second != NO_LABEL)


def test_text_and_counted_places(train: ShardRows) -> None:
    rows, facts = train.rows(np.arange(len(train))), train.tokenizer
    assert np.array_equal(train.is_text(rows), rows != facts.pad)
    assert int(train.is_counted(rows).sum()) == train.text_tokens - int((rows == facts.unk).sum())


def test_waiting_is_measured(train: ShardRows, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(reader, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    with RowStream(train, 1, 5, 24, None, lambda batch: batch.update) as stream:
        assert (next(stream), stream.waited_s, stream.total_waited_s) == (5, 3.0, 3.0)
        assert (next(stream), stream.waited_s, stream.total_waited_s) == (6, 4.0, 7.0)


def test_the_thread_is_ahead_of_the_caller(train: ShardRows) -> None:
    made: list[int] = []
    with RowStream(train, 1, 5, 24, None, lambda batch: made.append(batch.update)):
        # Those in the queue, and the one that waits for room in it.
        until(lambda: len(made) == QUEUE + 1, "the queue to be full")


def test_the_thread_ends_with_the_stream(train: ShardRows) -> None:
    with RowStream(train, 1, 0, 24, None, lambda batch: batch) as stream:
        next(stream)
        assert any(thread.name == "row-stream" for thread in threading.enumerate())
    assert not any(thread.name == "row-stream" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="stop here"), RowStream(train, 1, 0, 24, None, lambda batch: batch):
        raise RuntimeError("stop here")
    assert not any(thread.name == "row-stream" for thread in threading.enumerate())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_found_when_it_is_read(copy: Path) -> None:
    flip(copy / "train-00001.tar", 512 + 200)
    rows = ShardRows.open(copy, "train")
    assert len(rows.rows([0]))
    words = r"train-00001\.tar: the bytes from 512 on are not those that were written"
    with pytest.raises(DistlmError, match=words):
        rows.rows(np.arange(len(rows)))
    with RowStream(rows, 1, 0, 24, None, lambda batch: batch) as stream, pytest.raises(DistlmError, match=words):
        for _ in range(200):
            next(stream)
    assert len(verify_shards(copy)) == 1


def test_verify_finds_every_flipped_byte(copy: Path) -> None:
    for name, place in (("train-00000.tar", 3), ("valid-00000.tar", -1), ("test-00000.tar", 1000)):
        flip(copy / name, place)
    problems = verify_shards(copy)
    assert len(problems) == 3 and all("not those that were written" in problem for problem in problems)
    (copy / "train-00001.tar").unlink()
    assert any("train-00001.tar: missing" in problem for problem in verify_shards(copy))


def test_missing_and_cut_shards(copy: Path) -> None:
    shard = copy / "train-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    words = r"train-00001\.tar: \d+ bytes, and the manifest says \d+; .*distlm data shard"
    with pytest.raises(DistlmError, match=words):
        ShardRows.open(copy, "train")
    shard.unlink()
    with pytest.raises(DistlmError, match=r"train-00001\.tar: missing"):
        ShardRows.open(copy, "train")
    assert len(ShardRows.open(copy, "valid"))


def test_a_shard_of_another_folder(copy: Path, tmp_path: Path) -> None:
    """Of the right size even, from a text that differs in its words."""
    make_shards(tmp_path / "run", write_text(tmp_path / "text", 2000, seed=1), shard_text=10_000, chunk_rows=8)
    other = tmp_path / "run/shards/train-00000.tar"
    size = (copy / "train-00000.tar").stat().st_size
    (copy / "train-00000.tar").write_bytes(other.read_bytes()[:size].ljust(size, b"\0"))
    with pytest.raises(DistlmError, match="or of other shards"):
        ShardRows.open(copy, "train").rows([0])


def test_another_vocabulary_beside_the_shards(copy: Path) -> None:
    vocabulary = copy / "tokenizer/vocab.txt"
    pieces = vocabulary.read_text("utf-8").split("\n")
    pieces[20], pieces[21] = pieces[21], pieces[20]
    vocabulary.write_text("\n".join(pieces), "utf-8")
    with pytest.raises(DistlmError, match="tokenizer: not the vocabulary these shards were made with"):
        ShardRows.open(copy, "train")


def test_a_model_of_another_tokenizer(train: ShardRows) -> None:
    train.require_tokenizer(train.tokenizer.hash, train.vocabulary, "the model")
    with pytest.raises(DistlmError, match=r"shards of another tokenizer \(\w+; checkpoint x has 0123\)"):
        train.require_tokenizer("0123", train.vocabulary, "checkpoint x")
    words = "vocabulary mismatch: the shards' ids are below 80, checkpoint x has 30522 pieces"
    with pytest.raises(DistlmError, match=words):
        train.require_tokenizer("0123", 30522, "checkpoint x")


def test_folders_that_are_no_shards(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match=r"no finished shards here \(no manifest.json\); run `distlm data shard`"):
        ShardRows.open(tmp_path, "train")
    with pytest.raises(DistlmError, match="no dev split; it has train, valid, test"):
        ShardRows.open(copy, "dev")
    text = (copy / "manifest.json").read_text("utf-8")
    for old, new, words in (
        ('"kind": "distlm shards"', '"kind": "distlm datastore"', "not the manifest of shards"),
        ('"format": 1', '"format": 9', "format 9"),
        ('"rows": ', '"rows": 1', "edited or is damaged"),
        ('"row_tokens"', '"row_token"', "edited or is damaged"),
        ("}", "", "not valid JSON"),
    ):
        (copy / "manifest.json").write_text(text.replace(old, new), "utf-8")
        with pytest.raises(DistlmError, match=words):
            ShardRows.open(copy, "train")


def test_fingerprints_tell_contents(made: Path, train: ShardRows, tmp_path: Path) -> None:
    assert ShardRows.open(made, "train").fingerprint == train.fingerprint
    others = {ShardRows.open(made, "valid").fingerprint}
    make_shards(tmp_path / "run", write_text(tmp_path / "text", 2000, seed=1), shard_text=10_000, chunk_rows=8)
    others.add(ShardRows.open(tmp_path / "run/shards", "train").fingerprint)
    assert len(others) == 2 and train.fingerprint not in others
