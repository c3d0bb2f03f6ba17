"""The stage: what it writes, when it refuses, how it continues."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import write_text
from support.disk import small_disk
from support.foreign.text import write_packed, write_rows
from support.shards import hashes, letters, make_shards, manifest, shard_config, stop_now

from distlm.data.documents import documents
from distlm.data.shards import stage as stage_module
from distlm.data.shards.reader import ShardRows, verify_shards
from distlm.data.shards.stage import finished_shards, plan_shard
from distlm.data.shards.wordpiece import Encoder, WordPiece
from distlm.errors import DistlmError, Stopped
from distlm.runtime.files import bytes_below
from distlm.runtime.lock import is_lock
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"), train_lines=600)


@pytest.fixture(scope="module")
def made(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with finished shards; tests that change it take a copy."""
    run = tmp_path_factory.mktemp("made")
    make_shards(run, text)
    return run


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def all_rows(folder: Path, split: str) -> np.ndarray:
    rows = ShardRows.open(folder, split)
    return rows.rows(np.arange(len(rows)))


@pytest.mark.parametrize("cross", [True, False])
def test_every_token_of_every_document_is_there_in_order(text: Path, tmp_path: Path, cross: bool) -> None:
    make_shards(tmp_path, text, cross_documents=cross)
    folder = tmp_path / "shards"
    wordpiece = WordPiece.load(folder / "tokenizer", True)
    encoder, facts = Encoder(wordpiece), wordpiece.facts
    for split in ("train", "valid", "test"):
        lines = (text / f"{split}.txt").read_text("utf-8").split("\n")
        expected = [encoder.encode(part) for part, _ in documents(lines, "blank_line")]
        rows = all_rows(folder, split)
        tokens = rows[~np.isin(rows, (facts.pad, facts.cls, facts.sep))]
        assert np.array_equal(tokens, np.concatenate(expected))
        told = manifest(folder)["splits"][split]
        assert (told["rows"], told["tokens"], told["documents"]) == (len(rows), len(tokens), len(expected))
        shards = told["shards"]
        assert sum(shard["rows"] for shard in shards) == len(rows)
        assert len(shards) > 3 if split == "train" else len(shards) >= 1


def test_what_the_manifest_says(made: Path, text: Path) -> None:
    tree = manifest(made / "shards")
    assert tree["dtype"] == "uint16" and tree["tokenizer"]["vocabulary"] == 80
    assert tree["settings"]["row_tokens"] == 16 and tree["settings"]["vocabulary_size"] == 80
    source = tree["text"]["valid"][0]
    assert source["name"] == "valid.txt" and source["bytes"] == source["text"] == (text / "valid.txt").stat().st_size
    assert len(source["sha256"]) == 64
    assert not [path.name for path in (made / "shards").glob(".*") if not is_lock(path)]
    assert verify_shards(made / "shards") == []


def test_the_same_command_gives_the_same_bytes_or_does_nothing(made: Path, text: Path, tmp_path: Path) -> None:
    summary = make_shards(tmp_path, text)
    assert not summary["already"] and hashes(tmp_path / "shards") == hashes(made / "shards")
    before = {path: path.stat().st_mtime_ns for path in (made / "shards").rglob("*")}
    again = make_shards(made, text)
    assert again["already"] and again["train_rows"] == summary["train_rows"]
    assert {path: path.stat().st_mtime_ns for path in (made / "shards").rglob("*")} == before


def test_a_stop_between_two_shards_and_the_rest_later(
    made: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, stages, written = stage_module.write_shard, [], []

    def opened(stage: Stage, *rest: Any) -> Any:
        stages.append(stage)
        return real_units(stage, *rest)

    def counted(folder: Path, unit: Any, *rest: Any) -> Any:
        written.append(unit.name)
        if len(written) == 3:
            stop_now(stages[-1])
        return real(folder, unit, *rest)

    real_units = stage_module._write_units
    monkeypatch.setattr(stage_module, "_write_units", opened)
    monkeypatch.setattr(stage_module, "write_shard", counted)
    with pytest.raises(Stopped, match="boundary of data shard"):
        make_shards(tmp_path, text)
    assert written == ["train-00000", "train-00001", "train-00002"]
    with pytest.raises(DistlmError, match=r"no finished shards here \(unfinished: 3 whole shards yet\)"):
        ShardRows.open(tmp_path / "shards", "train")
    with pytest.raises(DistlmError, match=r"shards\.row_tokens: 16 there, 32 now"):
        make_shards(tmp_path / "other", text, row_tokens=32, folder=str(tmp_path / "shards"))
    make_shards(tmp_path, text)
    assert len(set(written)) == len(written), "no shard was written twice"
    assert hashes(tmp_path / "shards") == hashes(made / "shards")


def test_a_stop_while_a_vocabulary_is_trained(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage_module._vocabulary

    def stopped(stage: Stage, *rest: Any) -> Any:
        stop_now(stage)
        return real(stage, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "_vocabulary", stopped)
        with pytest.raises(Stopped):
            make_shards(tmp_path, text)
    assert make_shards(tmp_path, text)["already"] is False


@pytest.mark.parametrize("damage", ["missing", "cut", "tokenizer"])
def test_what_is_missing_is_made_again(copy: Path, made: Path, text: Path, damage: str) -> None:
    folder = copy / "shards"
    shard = folder / "train-00001.tar"
    kept = (folder / "train-00002.tar").stat().st_mtime_ns
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-600])
    else:
        shutil.rmtree(folder / "tokenizer")
    assert finished_shards(folder, shard_config(copy, text).shards) is None
    make_shards(copy, text)
    assert hashes(folder) == hashes(made / "shards")
    assert (folder / "train-00002.tar").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"row_tokens": 32}, r"shards\.row_tokens: 16 there, 32 now"),
        ({"documents": "line"}, r"shards\.documents: 'blank_line' there, 'line' now"),
        ({"vocabulary_size": 70}, r"shards\.vocabulary_size: 80 there, 70 now"),
        ({"splits": ["train"]}, r"shards\.splits"),
        ({"lower_case": False}, r"shards\.lower_case"),
    ],
)
def test_shards_of_other_settings_are_refused(
    made: Path, text: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(DistlmError, match=words):
        make_shards(tmp_path, text, folder=str(made / "shards"), **settings)


def test_shards_without_a_marker_need_no_room_beside_the_new_ones(
    copy: Path, made: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that was killed between a shard and its marker, on a disk that just fits."""
    folder = copy / "shards"
    (folder / "manifest.json").unlink()
    small_disk(monkeypatch, folder, bytes_below(folder) + 4000)
    make_shards(copy, text)
    assert hashes(folder) == hashes(made / "shards")


def test_another_vocabulary_file_is_refused(text: Path, tmp_path: Path) -> None:
    letters().save(tmp_path / "one", 16)
    WordPiece((*letters().pieces, "more"), True).save(tmp_path / "two", 16)
    make_shards(tmp_path / "run", text, vocabulary=str(tmp_path / "one"))
    with pytest.raises(DistlmError, match=r"shards\.vocabulary: '\w{32}' there, '\w{32}' now"):
        make_shards(tmp_path / "run2", text, vocabulary=str(tmp_path / "two"), folder=str(tmp_path / "run/shards"))
    same = {"vocabulary": str(tmp_path / "one" / "vocab.txt"), "folder": str(tmp_path / "run/shards")}
    assert make_shards(tmp_path / "run3", text, **same)["already"]


def test_changed_text_is_refused(copy: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(text, tmp_path / "text")
    with (tmp_path / "text/valid.txt").open("a") as stream:
        stream.write("more\n")
    with pytest.raises(DistlmError, match=r"not the text of the shards .*valid\.txt: \d+ bytes there, \d+ now"):
        make_shards(tmp_path / "other", tmp_path / "text", folder=str(copy / "shards"))


def test_foreign_files_are_not_touched(text: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(DistlmError, match=r"holds files that are not shards \(thesis\.tex\)"):
        make_shards(tmp_path / "run", text, folder=str(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_refusal_does_not_lock_the_run_directory(text: Path, tmp_path: Path) -> None:
    for settings in ({"vocabulary": "/nowhere/vocab.txt"}, {"splits": ["valid"]}):
        with pytest.raises(DistlmError, match=r"shards\.vocabulary"):
            make_shards(tmp_path, text, **settings)
    assert make_shards(tmp_path, text)["already"] is False


def test_a_split_without_words(tmp_path: Path) -> None:
    for split, words in (("train", "a b c\n"), ("valid", "\n \n"), ("test", "")):
        (tmp_path / f"{split}.txt").write_text(words)
    letters().save(tmp_path / "vocabulary", 16)
    for split, words in (("test", "test split has no text"), ("valid", "valid split gave no rows")):
        settings = {"splits": ["train", split], "vocabulary": str(tmp_path / "vocabulary")}
        with pytest.raises(DistlmError, match=words):
            make_shards(tmp_path / f"run-{split}", tmp_path, **settings)


def test_packed_and_divided_text_gives_the_same_rows(text: Path, tmp_path: Path) -> None:
    """The same text, a file per split or many, packed or not: the same documents, in other shards."""
    import gzip
    import lzma

    letters().save(tmp_path / "vocabulary", 16)
    settings = {"vocabulary": str(tmp_path / "vocabulary"), "cross_documents": False}
    make_shards(tmp_path / "plain", text, **settings)
    many = tmp_path / "many"
    for split in ("train", "valid", "test"):
        (many / split).mkdir(parents=True)
        parts = (text / f"{split}.txt").read_text("utf-8").split("\n\n")
        for number, part in enumerate(parts):
            data = (part + "\n").encode()
            (many / split / f"{number:03d}.txt{['', '.xz', '.gz'][number % 3]}").write_bytes(
                [data, lzma.compress(data), gzip.compress(data)][number % 3]
            )
    make_shards(tmp_path / "parts", many, documents="whole", **settings)
    for split in ("train", "valid", "test"):
        assert np.array_equal(all_rows(tmp_path / "parts/shards", split), all_rows(tmp_path / "plain/shards", split))


def test_a_hub_data_set(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that the real `datasets` library loads; its rows are lines."""
    datasets = pytest.importorskip("datasets", reason="the hub extra is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        lines = (text / f"{split}.txt").read_text("utf-8").removesuffix("\n").split("\n")
        table = datasets.Dataset.from_dict({"text": lines, "id": [*range(len(lines))]})
        table.to_parquet(tmp_path / f"hub/{name}.parquet")
    letters().save(tmp_path / "vocabulary", 16)
    settings: dict[str, Any] = {"vocabulary": str(tmp_path / "vocabulary"), "shard_text": 10**9}
    make_shards(tmp_path / "plain", text, **settings)
    make_shards(tmp_path / "run", source="hub", hub_name=str(tmp_path / "hub"), **settings)
    for split in ("train", "valid", "test"):
        assert np.array_equal(all_rows(tmp_path / "run/shards", split), all_rows(tmp_path / "plain/shards", split))
    assert manifest(tmp_path / "run/shards")["text"]["train"][0]["rows"] == 600
    assert make_shards(tmp_path / "run", source="hub", hub_name=str(tmp_path / "hub"), **settings)["already"]
    with pytest.raises(DistlmError, match=r"no column shards\.hub_field=words; it has text, id"):
        make_shards(tmp_path / "bad", source="hub", hub_name=str(tmp_path / "hub"), hub_field="words", **settings)


def test_large_vocabularies_take_four_bytes(text: Path, tmp_path: Path) -> None:
    pieces = (*letters().pieces, *(f"unused{number}" for number in range(70_000)), "w1")
    WordPiece(pieces, True).save(tmp_path / "vocabulary", 16)
    make_shards(tmp_path / "run", text, vocabulary=str(tmp_path / "vocabulary"), splits=["valid"])
    rows = ShardRows.open(tmp_path / "run/shards", "valid")
    assert manifest(tmp_path / "run/shards")["dtype"] == "int32"
    assert rows.vocabulary == len(pieces) and (rows.rows(np.arange(len(rows))) == len(pieces) - 1).any()


def test_the_plan_is_near_the_truth(text: Path, made: Path, tmp_path: Path) -> None:
    plan = plan_shard(shard_config(tmp_path, text, vocabulary=str(letters_of(tmp_path)), chunk_rows=256), 2)
    make_shards(tmp_path, text, vocabulary=str(tmp_path / "vocabulary"), chunk_rows=256)
    written = 2 * sum(split["rows"] for split in manifest(tmp_path / "shards")["splits"].values()) * 16
    # The estimate is for English: letters alone make more tokens.
    assert written / 4 < plan.disk_bytes < 2 * written
    assert "shards" in plan.line() and plan.seconds is not None
    done = plan_shard(shard_config(made, text))
    assert done.disk_bytes == 0 and "nothing to do" in done.line()
    hub = plan_shard(shard_config(tmp_path / "hub", source="hub", hub_name="some/set"))
    assert "only when it is loaded" in hub.line() and "disk unknown, memory/rank unknown" in hub.line()


def letters_of(folder: Path) -> Path:
    letters().save(folder / "vocabulary", 16)
    return folder / "vocabulary"


def test_shards_live_where_the_settings_say(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.shards(shard_config(tmp_path)) == tmp_path / "shards"
    assert run.shards(shard_config(tmp_path, folder="/else/where")) == Path("/else/where")


def test_the_same_text_in_another_form_gives_the_same_rows(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"vocabulary": str(letters_of(tmp_path))}
    splits = ("train", "valid", "test")
    for split in splits:
        data = (text / f"{split}.txt").read_bytes()
        write_packed(tmp_path / f"plain/{split}.txt", data + b"\n[SEP] [MASK] a[SEP]\n")
        cr = (data + b"\n[SEP] [MASK] a[SEP]\n").replace(b"\n", b"\r")
        write_packed(tmp_path / f"other/{split}.txt.bz2", b"\xef\xbb\xbf" + cr)
        documents = data.decode().split("\n\n")
        write_rows(tmp_path / f"rows/{split}.jsonl.xz", [*documents, "[SEP] [MASK] a[SEP]"])
    for name in ("plain", "other", "rows"):
        make_shards(tmp_path / f"run-{name}", tmp_path / name, **settings)
        assert "note: the text spells '[SEP]' 6 times, '[MASK]' 3 times; that stays text" in capsys.readouterr().err
    for split in splits:
        one = all_rows(tmp_path / "run-plain/shards", split)
        assert np.array_equal(one, all_rows(tmp_path / "run-other/shards", split))
        # Shards of rows are cut elsewhere: the tokens are the same.
        other = all_rows(tmp_path / "run-rows/shards", split)
        assert np.array_equal(one[one >= 5], other[other >= 5])
        assert not (one == letters().facts.mask).any()


def test_finished_shards_stay_so_beside_files_that_are_now_read(text: Path, tmp_path: Path) -> None:
    """Shards of before .csv was a text: what lies beside their files was left out then."""
    for split in ("train", "valid", "test"):
        write_packed(tmp_path / f"text/{split}/a.txt", (text / f"{split}.txt").read_bytes())
    settings = {"vocabulary": str(letters_of(tmp_path))}
    make_shards(tmp_path, tmp_path / "text", **settings)
    write_rows(tmp_path / "text/train/notes.csv", ["more"])
    write_rows(tmp_path / "text/train.jsonl", ["more"])
    assert make_shards(tmp_path, tmp_path / "text", **settings)["already"]
    write_packed(tmp_path / "text/train/b.txt", b"more\n")
    with pytest.raises(DistlmError, match=r"not the text of the shards .*train/b\.txt: no bytes there, 5 now"):
        make_shards(tmp_path, tmp_path / "text", **settings)
