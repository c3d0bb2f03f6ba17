import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.disk import small_disk
from support.foreign.text import write_packed, write_rows
from support.present import present

from distlm.config import RunConfig
from distlm.data import prepare as prepare_module
from distlm.data.dictionary import Dictionary
from distlm.data.prepare import PrepareSummary, finished_tokens, plan_prepare, run_prepare
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError, Stopped
from distlm.runtime.files import file_hash
from distlm.runtime.ranks.world import World
from distlm.runtime.stage import open_stage

Prepare = Callable[..., PrepareSummary]
Configure = Callable[..., RunConfig]
SPLITS = ("train", "valid", "test")


def test_ids_are_those_of_a_plain_loop(prepare: Prepare, folder: list[str], text: Path, tmp_path: Path) -> None:
    with (text / "valid.txt").open("a", encoding="utf-8") as stream:
        stream.write("w1 never-seen <unk>\n\nno newline at the end")
    summary = prepare(*folder)
    tokens = TokenFiles.open(tmp_path / "run" / "tokens")
    for split in SPLITS:
        expected = []
        for line in (text / f"{split}.txt").read_text("utf-8").removesuffix("\n").split("\n"):
            for word in line.split():
                known = word in tokens.dictionary.words
                expected.append(tokens.dictionary.words.index(word) if known else Dictionary.UNK)
            expected.append(Dictionary.EOS)
        assert tokens.split(split).dtype == np.int32
        assert tokens.split(split).tolist() == expected
        facts = tokens.meta.splits[split]
        assert facts.tokens == len(expected) == summary["tokens"][split]
        assert facts.lines == expected.count(Dictionary.EOS)
        assert facts.unk == expected.count(Dictionary.UNK)
        assert facts.hash == file_hash(tokens.folder / f"{split}.bin")
    assert tokens.meta.splits["valid"].unk == 2 + 5  # never-seen, <unk>; no, newline, at, the, end
    assert summary["vocabulary"] == len(tokens.dictionary) == tokens.meta.vocabulary


def test_chunks_do_not_show(
    prepare: Prepare, folder: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(*folder)
    monkeypatch.setattr(prepare_module, "CHUNK", 7)
    prepare(*folder, run="small")
    assert (tmp_path / "run/tokens/meta.json").read_bytes() == (tmp_path / "small/tokens/meta.json").read_bytes()


def test_min_count_max_words_and_padding_reach_the_dictionary(
    prepare: Prepare, folder: list[str], tmp_path: Path
) -> None:
    prepare(*folder, "data.max_words=10", "data.pad_to_multiple=4")
    tokens = TokenFiles.open(tmp_path / "run" / "tokens")
    assert len(tokens.dictionary) == 16 and tokens.dictionary.words[-1] == "madeupword0001"
    assert tokens.meta.splits["train"].unk == int((tokens.split("train") == 3).sum()) > 0


def test_first_words_keeps_whole_lines_from_the_beginning_of_each_split(
    prepare: Prepare, folder: list[str], tmp_path: Path
) -> None:
    prepare(*folder, run="whole")
    prepare(*folder, "data.first_words=100")
    whole, tokens = (TokenFiles.open(tmp_path / run / "tokens") for run in ("whole", "run"))
    for split in SPLITS:
        ends = np.flatnonzero(whole.split(split) == Dictionary.EOS) + 1
        kept = int(ends[ends <= 100][-1])
        assert len(tokens.split(split)) == kept
        # The dictionary is of what is kept.
        words = [[of.dictionary.words[id] for id in of.split(split)[:kept]] for of in (whole, tokens)]
        assert all(ours in (theirs, "<unk>") for theirs, ours in zip(*words, strict=True))
        assert tokens.meta.splits[split].lines == int((ends <= 100).sum())
    assert tokens.meta.settings.first_words == 100
    assert "<unk>" not in [tokens.dictionary.words[id] for id in tokens.split("train")]
    with pytest.raises(DistlmError, match=r"data\.first_words: 100 there, 90 now"):
        prepare(*folder, "data.first_words=90")
    with pytest.raises(DistlmError, match=r"data\.first_words=1: the first line of .*train\.txt has more words"):
        prepare(*folder, "data.first_words=1", run="none")


def test_meta_records_settings_source_and_edition(prepare: Prepare, folder: list[str], tmp_path: Path) -> None:
    assert prepare(*folder)["edition"] is None
    meta = json.loads((tmp_path / "run/tokens/meta.json").read_text())
    assert meta["dtype"] == "int32" and meta["edition"] is None
    assert meta["settings"]["min_count"] == 1 and meta["settings"]["text_dir"].endswith("text")
    assert set(meta["source"]["files"]) == set(SPLITS)
    assert len(meta["source"]["files"]["train"]["sha256"]) == 64


def test_second_run_does_nothing_and_says_so(
    prepare: Prepare, folder: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare(*folder)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/tokens").iterdir()}
    second = prepare(*folder)
    assert (first["already"], second["already"]) == (False, True)
    assert {**first, "already": True} == second
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run/tokens").iterdir()} == before
    assert "complete with the same settings; nothing to do" in capsys.readouterr().err


def test_shared_folder_with_other_settings_is_refused_naming_them(
    prepare: Prepare, folder: list[str], tmp_path: Path
) -> None:
    shared = f"data.tokens_dir={tmp_path / 'shared'}"
    prepare(*folder, shared)
    meta = (tmp_path / "shared/meta.json").read_bytes()
    assert prepare(*folder, shared, run="second")["already"]
    with pytest.raises(DistlmError, match=r"data\.min_count: 1 there, 3 now; data\.max_words: 0 there, 9 now"):
        prepare(*folder, shared, "data.min_count=3", "data.max_words=9", run="third")
    with pytest.raises(DistlmError, match=r"data\.source: 'folder' there, 'demo' now"):
        prepare(shared, run="fourth")
    assert (tmp_path / "shared/meta.json").read_bytes() == meta


def test_settings_of_other_sources_do_not_matter(configure: Configure, prepare: Prepare, folder: list[str]) -> None:
    prepare(*folder)
    config = configure(*folder, "data.hub_name=unused")
    assert finished_tokens(Path(config.run_dir) / "tokens", config.data) is not None


def test_text_that_changed_since_is_refused_and_text_that_is_gone_is_not_needed(
    prepare: Prepare, folder: list[str], text: Path
) -> None:
    prepare(*folder)
    with (text / "test.txt").open("a") as stream:
        stream.write("more\n")
    with pytest.raises(DistlmError, match=r"test\.txt: has \d+ bytes, and had \d+ when .* was prepared"):
        prepare(*folder)
    shutil.rmtree(text)
    assert prepare(*folder)["already"]


@pytest.mark.parametrize("linked", [False, True])
def test_files_that_were_added_to_a_splits_folder_are_refused(
    prepare: Prepare, text: Path, tmp_path: Path, linked: bool
) -> None:
    """In the form of those that are there; others may have been left out when the text was prepared."""
    for split in SPLITS:
        write_packed(tmp_path / f"divided/{split}/a.txt", (text / f"{split}.txt").read_bytes())
    settings = ["data.source=folder", f"data.text_dir={tmp_path / 'divided'}"]
    prepare(*settings)
    write_rows(tmp_path / "divided/train/notes.csv", ["more"])
    write_packed(tmp_path / "divided/train/.ipynb_checkpoints/a.txt", b"more\n")
    assert prepare(*settings)["already"]
    if linked:
        write_packed(tmp_path / "elsewhere/b.txt", b"more\n")
        (tmp_path / "divided/test/part").symlink_to(tmp_path / "elsewhere")
        name = "test/part/b.txt"
    else:
        write_packed(tmp_path / (name := "divided/train/b.txt"), b"more\n")
    with pytest.raises(DistlmError, match=rf"{name}: was not there when .*tokens was prepared; move it away"):
        prepare(*settings)
    shutil.rmtree(tmp_path / "divided")
    assert prepare(*settings)["already"]


def test_bad_bytes_in_the_last_split_are_found_before_anything_is_written(
    prepare: Prepare, folder: list[str], text: Path, tmp_path: Path
) -> None:
    (text / "test.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(DistlmError, match=r"test\.txt, line 2: not UTF-8"):
        prepare(*folder)
    tokens = tmp_path / "run/tokens"
    assert not [path.name for path in tokens.iterdir() if not path.name.startswith(".prepare")], "before any work"
    with pytest.raises(DistlmError, match=r"no finished token files here .*distlm data prepare"):
        TokenFiles.open(tokens)
    (text / "test.txt").write_bytes(b"fine\n")
    assert not prepare(*folder)["already"]


def test_train_without_words(prepare: Prepare, folder: list[str], text: Path) -> None:
    (text / "train.txt").write_text("\n\n")
    with pytest.raises(DistlmError, match=r"train\.txt: no word is left for the dictionary"):
        prepare(*folder)


def test_folder_with_other_files_is_left_alone(prepare: Prepare, folder: list[str], text: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in ("train.bin", "train.idx", "dict.txt"):
        (shared / name).write_text("another program's")
    with pytest.raises(DistlmError, match=r"not token files \(train\.idx\); choose an empty or new folder"):
        prepare(*folder, f"data.tokens_dir={shared}")
    assert (shared / "train.bin").read_text() == "another program's"
    with pytest.raises(DistlmError, match="this is a file"):
        prepare(*folder, f"data.tokens_dir={text / 'train.txt'}", run="second")


def test_full_disk_is_refused_before_anything_is_written(
    prepare: Prepare, folder: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(DistlmError, match=r"token files needs .* and the disk has 100 B free"):
        prepare(*folder)
    assert not list((tmp_path / "run/tokens").glob("*.bin"))


def test_a_killed_start_begins_anew_on_a_disk_that_just_fits(
    prepare: Prepare, folder: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, real = tmp_path / "run/tokens", prepare_module._write_split

    def killed(into: Path, corpus: Any, split: str, *rest: Any) -> Any:
        if split != "train":
            raise KeyboardInterrupt
        return real(into, corpus, split, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_write_split", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(*folder)
    assert (tokens / "train.bin").is_file()
    small_disk(monkeypatch, tokens, (tokens / "train.bin").stat().st_size * 3 // 2)
    assert not prepare(*folder)["already"]


def test_stop_signal_ends_it_at_a_chunk_and_the_next_run_starts_over(
    configure: Configure, prepare: Prepare, folder: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "CHUNK", 50)
    with open_stage("prepare", configure(*folder), World(0, 1, 0, 1, "here", "single")) as stage:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match="stopped while preparing"):
            run_prepare(stage)
    assert not (tmp_path / "run/tokens/meta.json").exists()
    assert not prepare(*folder)["already"]


def test_plan_is_a_close_upper_bound_of_what_is_written(
    configure: Configure, prepare: Prepare, folder: list[str], tmp_path: Path
) -> None:
    plan = plan_prepare(configure(*folder), 4)
    assert "one rank works, the others wait" in plan.notes
    prepare(*folder)
    written = sum(path.stat().st_size for path in (tmp_path / "run/tokens").glob("*.bin"))
    assert written <= plan.disk_bytes <= 1.3 * written
    done = plan_prepare(configure(*folder), 4)
    assert done.disk_bytes == 0 and "complete, nothing to do" in done.work


def test_plan_of_missing_text_and_of_the_other_sources(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match="no such folder"):
        plan_prepare(configure("data.source=folder", f"data.text_dir={tmp_path / 'nowhere'}"), 1)
    assert plan_prepare(configure(), 1).disk_bytes > 1_900_000
    assert plan_prepare(configure("data.source=hub", "data.hub_name=a/b"), 1).seconds is None


def test_demo_corpus_through_the_stage(prepare: Prepare, tmp_path: Path) -> None:
    summary = prepare()
    demo = present(TokenFiles.open(tmp_path / "run/tokens").meta.source.demo)
    if demo.fallback is None:
        assert summary["tokens"] == {"train": 477_392, "valid": 26_227, "test": 26_554}
    assert demo.licence


def test_hub_set_gives_the_tokens_of_the_same_text_in_a_folder(
    prepare: Prepare, folder: list[str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="the hub extra is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub = tmp_path / "hub"
    hub.mkdir()
    for split in SPLITS:
        shutil.copy(text / f"{split}.txt", hub / f"{split.replace('valid', 'validation')}.txt")
    prepare(*folder)
    prepare("data.source=hub", f"data.hub_name={hub}", run="hubrun")
    left, right = TokenFiles.open(tmp_path / "run/tokens"), TokenFiles.open(tmp_path / "hubrun/tokens")
    assert left.fingerprint == right.fingerprint


@pytest.mark.parametrize("form", ["mark", "cr", "xz", "jsonl", "csv", "parquet", "folder"])
def test_the_same_text_in_another_form_gives_the_same_tokens(
    prepare: Prepare, configure: Configure, folder: list[str], text: Path, tmp_path: Path, form: str
) -> None:
    other = tmp_path / "other"
    for split in SPLITS:
        data = (text / f"{split}.txt").read_bytes()
        lines = data.decode().removesuffix("\n").split("\n")
        if form == "mark":
            write_packed(other / f"{split}.txt", b"\xef\xbb\xbf" + data)
        elif form == "cr":
            write_packed(other / f"{split}.txt", data.replace(b"\n", b"\r"))
        elif form == "xz":
            write_packed(other / f"{split}.txt.xz", data)
        elif form == "folder":
            write_packed(other / split / "1.txt", "".join(line + "\n" for line in lines[:7]).encode())
            write_rows(other / split / "2.jsonl.gz", ["\n".join(lines[7:9]) + "\n", *lines[9:11]])
            write_packed(other / split / "3/a.txt", "".join(line + "\n" for line in lines[11:]).encode())
        else:
            write_rows(other / f"{split}.{form}", lines)
    prepare(*folder)
    settings = ["data.source=folder", f"data.text_dir={other}"]
    plan = plan_prepare(configure(*settings, run="planned"))
    prepare(*settings, run="second")
    one, two = (TokenFiles.open(tmp_path / run / "tokens") for run in ("run", "second"))
    assert one.fingerprint == two.fingerprint
    assert [facts.lines for facts in one.meta.splits.values()] == [facts.lines for facts in two.meta.splits.values()]
    written = sum(facts.tokens for facts in two.meta.splits.values()) * 4
    assert 0.8 * written <= plan.disk_bytes <= 1.5 * written
    assert prepare(*settings, run="second")["already"]
    # A change of any file is noticed.
    changed = sorted(path for path in other.rglob("*") if path.is_file())[-1]
    changed.write_bytes(changed.read_bytes() + b" ")
    with pytest.raises(DistlmError, match=rf"{changed.name}: has \d+ bytes, and had"):
        prepare(*settings, run="second")


def test_a_packed_edition_is_known_by_its_counts(
    prepare: Prepare, folder: list[str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(prepare_module, "recognise", lambda tokens, types, sha256: seen.append(sha256))
    prepare(*folder)
    data = (text / "test.txt").read_bytes()
    (text / "test.txt").unlink()
    write_packed(text / "test.txt.gz", data)
    prepare(*folder, run="second")
    assert set(seen[0]) == set(SPLITS) and seen[1] is None


def test_new_settings_are_recorded_only_where_they_count(prepare: Prepare, folder: list[str], tmp_path: Path) -> None:
    prepare(*folder)
    settings = json.loads((tmp_path / "run/tokens/meta.json").read_text())["settings"]
    assert [*settings] == ["source", "text_dir", "min_count", "max_words", "pad_to_multiple"]
    shared = [*folder, f"data.tokens_dir={tmp_path / 'run/tokens'}"]
    assert prepare(*shared, "data.documents=title", run="second")["already"], "it decides only where shares do"
    with pytest.raises(DistlmError, match=r"data\.text_field: None there, 'body' now"):
        prepare(*shared, "data.text_field=body", run="third")


def test_text_that_unpacks_to_nothing(prepare: Prepare, folder: list[str], text: Path) -> None:
    (text / "train.txt").unlink()
    write_packed(text / "train.txt.gz", b"")
    with pytest.raises(DistlmError, match=r"train\.txt\.gz: no lines; the train split needs text"):
        prepare(*folder)


def test_a_dictionary_that_is_none_is_told_as_such(prepare: Prepare, folder: list[str], tmp_path: Path) -> None:
    for held, said in ((b"\xff\x00\x80", "not UTF-8 text"), (b"one two\n", "line 1: expected 'word count'")):
        (tmp_path / "words").write_bytes(held)
        with pytest.raises(DistlmError, match=r"data.dictionary=.*words: not a dictionary") as caught:
            prepare(*folder, f"data.dictionary={tmp_path / 'words'}")
        assert said in str(caught.value) and "distlm data prepare" not in str(caught.value)
