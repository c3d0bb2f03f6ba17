"""Documents split off train: whole ones, the same in every format and on any number of ranks."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.foreign.text import write_packed, write_rows
from support.shards import hashes, letters, make_shards, manifest, shard_config

from distlm.config import DataConfig
from distlm.config.load import load_config
from distlm.data.corpus import Corpus, open_corpus
from distlm.data.prepare import plan_prepare
from distlm.data.shards.reader import ShardRows
from distlm.data.shards.stage import plan_shard
from distlm.data.text.held_out import split_of
from distlm.data.text.source import Cutting, FileSource
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError, UsageError

SPLITS = ("train", "valid", "test")
Prepare = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Some of several lines, each with words of its own."""
    chance = random.Random(3)
    return [
        "\n".join(f"d{number} line{line} w{chance.randrange(30)}" for line in range(chance.randrange(1, 4)))
        for number in range(300)
    ]


def as_text(documents: list[str]) -> bytes:
    return "\n\n".join(documents).encode() + b"\n"


def corpus(folder: Path, valid_share: float = 0.1, test_share: float = 0.05, **fields: Any) -> Corpus:
    return open_corpus(DataConfig(text_dir=str(folder), valid_share=valid_share, test_share=test_share, **fields))


def numbers(corpus: Corpus, split: str) -> list[int]:
    """Of the documents, in the order of the lines."""
    return list(dict.fromkeys(int(line.split()[0][1:]) for line in corpus.read(split) if line.strip()))


def test_splits_have_whole_documents_once_each(tmp_path: Path, documents: list[str]) -> None:
    write_packed(tmp_path / "train.txt", as_text(documents))
    found = corpus(tmp_path)
    by_split = {split: numbers(found, split) for split in SPLITS}
    assert sorted(number for of_split in by_split.values() for number in of_split) == [*range(300)]
    assert all(of_split == sorted(of_split) for of_split in by_split.values())
    assert 15 < len(by_split["valid"]) < 45 and 5 < len(by_split["test"]) < 30
    lines = [line for split in SPLITS for line in found.read(split) if line]
    assert sorted(lines) == sorted(line for document in documents for line in document.split("\n"))
    assert by_split["valid"] == [
        number for number in range(300) if split_of("train", number, {"valid": 0.1}) == "valid"
    ]
    # A larger share keeps the documents of a smaller one.
    assert set(by_split["valid"]) < set(numbers(corpus(tmp_path, 0.2), "valid"))
    assert 0.8 < sum(found.lines.values()) / (len(lines) + 299) < 1.2
    assert found.sha256 is None


@pytest.mark.parametrize("name", ["train.txt.xz", "train.jsonl", "train.jsonl.gz", "train.csv", "train.parquet"])
def test_every_format_is_split_alike(tmp_path: Path, documents: list[str], name: str) -> None:
    write_packed(tmp_path / "text/train.txt", as_text(documents))
    if ".txt" in name:
        write_packed(tmp_path / "other" / name, as_text(documents))
    else:
        write_rows(tmp_path / "other" / name, documents)
    one, other = corpus(tmp_path / "text"), corpus(tmp_path / "other")
    for split in SPLITS:
        assert numbers(one, split) == numbers(other, split)
        assert [line for line in one.read(split) if line] == [line for line in other.read(split) if line]


def test_where_a_document_ends_is_a_setting(tmp_path: Path) -> None:
    article = " = Name {} = \n\n a b\n\n c\n\n"
    write_packed(tmp_path / "train.txt", "".join(article.format(number) for number in range(60)).encode())
    for line in corpus(tmp_path, 0.3, documents="title").read("valid"):
        assert line.startswith(" = Name ") or line in ("", " a b", " c")
    whole = corpus(tmp_path, 0.3, documents="title")
    assert sum(map(bool, whole.read("valid"))) % 3 == 0
    assert {len(line.split()) for line in corpus(tmp_path, 0.3, documents="line").read("valid")} == {0, 1, 2, 4}
    with pytest.raises(DistlmError, match=r"no document of train is in the .* data\.documents=whole says"):
        corpus(tmp_path, documents="whole")


def test_files_of_a_folder_are_documents_under_whole(tmp_path: Path, documents: list[str]) -> None:
    for number, document in enumerate(documents):
        write_packed(tmp_path / f"train/{number:03d}.txt", document.encode() + b"\n")
    found = corpus(tmp_path, documents="whole")
    by_split = {split: numbers(found, split) for split in SPLITS}
    assert sorted(number for of_split in by_split.values() for number in of_split) == [*range(300)]
    assert 10 < len(by_split["valid"]) < 50
    # A file more moves no other.
    write_packed(tmp_path / "train/0000.txt", b"d999 x\n")
    assert set(by_split["valid"]) <= {*numbers(corpus(tmp_path, documents="whole"), "valid")}


def test_a_split_that_is_there_is_not_replaced(tmp_path: Path, documents: list[str]) -> None:
    write_packed(tmp_path / "train.txt", as_text(documents))
    with pytest.raises(DistlmError, match=r"valid\.txt: no such file .*data\.valid_share and data\.test_share split"):
        corpus(tmp_path, 0, 0)
    with pytest.raises(DistlmError, match=r"test\.txt: no such file"):
        corpus(tmp_path, test_share=0)
    write_packed(tmp_path / "test.txt", b"d7 own\n")
    assert numbers(corpus(tmp_path, test_share=0), "test") == [7]
    with pytest.raises(DistlmError, match=r"test\.txt: the test split is there; leave data\.test_share out"):
        corpus(tmp_path)
    with pytest.raises(DistlmError, match=r"data\.source=demo has all splits"):
        open_corpus(DataConfig(source="demo", valid_share=0.1))


def test_shares_that_cannot_be() -> None:
    for settings, words in (
        (["data.valid_share=1"], r"data\.valid_share=1\.0: must be in \[0, 1\)"),
        (
            ["data.valid_share=0.5", "data.test_share=0.5"],
            r"data\.test_share=0\.5: with data\.valid_share=0\.5 nothing",
        ),
    ):
        with pytest.raises(UsageError, match=words):
            load_config("demo", settings)
    with pytest.raises(UsageError, match=r"shards\.test_share=-0\.1: must be in"):
        load_config("plm-small", ["shards.test_share=-0.1"])


def test_token_files_of_shares(
    prepare: Prepare, configure: Callable[..., Any], tmp_path: Path, documents: list[str]
) -> None:
    write_packed(tmp_path / "text/train.txt", as_text(documents))
    settings = [
        "data.source=folder",
        f"data.text_dir={tmp_path / 'text'}",
        "data.valid_share=0.1",
        "data.test_share=0.05",
    ]
    plan = plan_prepare(configure(*settings))
    summary = prepare(*settings)
    assert summary["tokens"]["train"] > summary["tokens"]["valid"] > summary["tokens"]["test"] > 0
    assert sum(summary["tokens"].values()) * 4 <= plan.disk_bytes <= 1.3 * sum(summary["tokens"].values()) * 4
    meta = TokenFiles.open(tmp_path / "run/tokens").meta
    assert (meta.settings.valid_share, meta.settings.test_share, meta.settings.documents) == (0.1, 0.05, "blank_line")
    assert meta.source.files and [*meta.source.files] == ["train"]
    assert prepare(*settings)["already"]
    with pytest.raises(DistlmError, match=r"data\.valid_share: 0\.1 there, 0\.2 now"):
        prepare(*settings, "data.valid_share=0.2", f"data.tokens_dir={tmp_path / 'run/tokens'}", run="other")
    with (tmp_path / "text/train.txt").open("ab") as stream:
        stream.write(b"more\n")
    with pytest.raises(DistlmError, match=r"train\.txt: has \d+ bytes, and had"):
        prepare(*settings)


def words_of(folder: Path, split: str) -> np.ndarray:
    rows = ShardRows.open(folder, split)
    ids = rows.rows(np.arange(len(rows)))
    return ids[ids >= 5]


def test_shards_of_shares_are_those_of_the_same_documents_in_files(tmp_path: Path, documents: list[str]) -> None:
    write_rows(tmp_path / "train_only/train.jsonl", documents)
    found = corpus(tmp_path / "train_only")
    for split in SPLITS:
        write_rows(tmp_path / f"apart/{split}.jsonl", [documents[number] for number in numbers(found, split)])
    letters().save(tmp_path / "vocabulary", 16)
    settings = {"vocabulary": str(tmp_path / "vocabulary"), "cross_documents": False}
    shares = {"valid_share": 0.1, "test_share": 0.05}
    plan = plan_shard(shard_config(tmp_path / "one", tmp_path / "train_only", **settings, **shares))
    make_shards(tmp_path / "one", tmp_path / "train_only", **settings, **shares)
    make_shards(tmp_path / "other", tmp_path / "apart", **settings)
    for split in SPLITS:
        one, other = (words_of(tmp_path / name / "shards", split) for name in ("one", "other"))
        assert len(one) and np.array_equal(one, other)
    told = manifest(tmp_path / "one/shards")
    apart = manifest(tmp_path / "other/shards")
    assert told["settings"]["valid_share"] == 0.1 and "valid_share" not in apart["settings"]
    assert told["text"]["valid"] == told["text"]["train"]
    assert told["splits"]["valid"]["documents"] == len(numbers(found, "valid"))
    without = plan_shard(shard_config(tmp_path / "unmade", tmp_path / "apart", **settings))
    assert 0.9 < plan.disk_bytes / without.disk_bytes < 1.1
    assert make_shards(tmp_path / "one", tmp_path / "train_only", **settings, **shares)["already"]
    # One split alone, in a folder of its own, is that split.
    make_shards(tmp_path / "alone", tmp_path / "train_only", splits=["valid"], **settings, **shares)
    name = "valid-00000.tar"
    assert hashes(tmp_path / "alone/shards")[name] == hashes(tmp_path / "one/shards")[name]
    with (tmp_path / "train_only/train.jsonl").open("a") as stream:
        stream.write('{"text": "more"}\n')
    with pytest.raises(DistlmError, match=r"not the text of the shards .*train\.jsonl"):
        make_shards(tmp_path / "alone", tmp_path / "train_only", splits=["valid"], **settings, **shares)


def test_a_hub_set_with_train_alone(tmp_path: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the hub extra is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_rows(tmp_path / "hub/train.parquet", documents)
    hub: dict[str, Any] = {"source": "hub", "hub_name": str(tmp_path / "hub")}
    shutil.copytree(tmp_path / "hub", tmp_path / "folder")
    one, other = corpus(Path(), documents="whole", **hub), corpus(tmp_path / "folder")
    for split in SPLITS:
        assert list(one.read(split)) == list(other.read(split))
    with pytest.raises(DistlmError, match=r"no document of train is in the .* split .*data\.documents=whole"):
        corpus(Path(), **hub)
    with pytest.raises(DistlmError, match=r"no test split; it has train; data\.valid_share and data\.test_share split"):
        corpus(Path(), test_share=0, documents="whole", **hub)
    letters().save(tmp_path / "vocabulary", 16)
    settings: dict[str, Any] = {
        "vocabulary": str(tmp_path / "vocabulary"),
        "valid_share": 0.1,
        "test_share": 0.05,
        "documents": "whole",
    }
    make_shards(tmp_path / "hub_run", **hub, **settings)
    make_shards(tmp_path / "folder_run", tmp_path / "folder", **settings)
    for split in SPLITS:
        name = f"{split}-00000.tar"
        assert hashes(tmp_path / "hub_run/shards")[name] == hashes(tmp_path / "folder_run/shards")[name]
    write_rows(tmp_path / "hub/validation.parquet", documents[:3])
    with pytest.raises(DistlmError, match=r"it has a validation split; leave data\.valid_share out to use that"):
        corpus(Path(), documents="whole", **hub)


def test_segments_grow_to_the_size_of_shards(tmp_path: Path, documents: list[str]) -> None:
    path = write_packed(tmp_path / "train.txt", as_text(documents))
    found = FileSource(path, "train.txt").scan(0, Cutting("blank_line", 100, {"valid": 0.02}), lambda size: None)
    own, held = found.segments, found.of("valid")
    assert all(segment.bytes == segment.end - segment.start for segment in (*own, *held))
    assert sum(segment.bytes for segment in (*own, *held)) == path.stat().st_size
    assert 0 < len(held) < 20 and 100 <= np.median([segment.bytes for segment in own]) < 200
