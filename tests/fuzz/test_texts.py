"""Text that is none, and text as hardly anybody writes it: prepared, or refused in one line that names the file."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TINY
from support.fuzz import Outcome, command, has_manners, times
from support.kinds import readable
from support.plm import PLM

Factory = pytest.TempPathFactory
GOOD = b"a b c\n d e\n\n" * 60
TEXTS: dict[str, bytes] = {
    "empty": b"", "blanks": b" \n\t \n\n", "one line feed": b"\n", "no line feed": b"a",
    "no line feed at the end": GOOD[:-2], "carriage returns": GOOD.replace(b"\n", b"\r"),
    "of Windows": GOOD.replace(b"\n", b"\r\n"), "one line": b"a b " * 50_000, "one word": b"x" * 200_000,
    "NUL": GOOD + b"a\0b\n", "NULs": b"\0" * 4096, "binary": bytes(range(256)) * 20,
    "UTF-16": GOOD.decode().encode("utf-16"), "UTF-16 without a mark": GOOD.decode().encode("utf-16-le"),
    "UTF-8 with a mark": b"\xef\xbb\xbf" + GOOD, "Latin-1": "\xe9t\xe9 \n".encode("latin-1") * 30,
    "cut": GOOD + b"\xe2\x82", "surrogates": b"\xed\xa0\x80 a\n", "overlong": b"\xc0\x80 a\n",
    "other blanks": "a\u00a0b\u2003c\u2028d\u0085e\n".encode() * 30,
    "other ends of lines": b"a\x0bb\x0cc\x1cd\n" * 30,
    "special words": b"<unk> </s> <pad> <s> [CLS] [MASK] [SEP]\n" * 30,
    "emoji": "\U0001f468\u200d\U0001f469 e\u0301\n".encode() * 30, "control": b"\x1b[31m a \x07\n" * 30,
    "gzip": b"\x1f\x8b\x08\x00 no", "HTML": b"<!DOCTYPE html><p>404" * 30,
}  # fmt: skip
NAMES = ("{}.txt", "{}.jsonl", "{}.csv", "{}.parquet", "{}.txt.gz", "{}.txt.xz", "{}.txt.bz2", "{}.txt.zst",
         "wiki.{}.tokens", "{}/a.txt")  # fmt: skip


def prepared(folder: Path, damaged: bytes, name: str, split: str, verb: str) -> Outcome:
    """`data prepare` or `data shard` of a folder in which one split is `damaged`, in a file with this name."""
    shutil.rmtree(folder, ignore_errors=True)
    for each in ("train", "valid", "test"):
        path = folder / "text" / (name if each == split else "{}.txt").format(each)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damaged if each == split else GOOD)
    if verb == "data prepare":
        words = ["demo", *TINY, "data.source=folder", f"data.text_dir={folder / 'text'}"]
    else:
        words = ["plm-base", *readable([*TINY, *PLM]), f"shards.text_dir={folder / 'text'}"]
    return command(*verb.split(), *words, f"run_dir={folder / 'run'}")


def judged(done: Outcome, folder: Path, split: str) -> None:
    has_manners(done)
    if done.code:
        assert split in done.told[0], done
        assert not list((folder / "run").glob("tokens/meta.json")), done


@pytest.mark.parametrize("text", TEXTS)
def test_a_text(text: str, tmp_path: Path) -> None:
    judged(prepared(tmp_path, TEXTS[text], "{}.txt", "train", "data prepare"), tmp_path, "train")


@pytest.mark.parametrize("sort", ["pipe", "folder", "dangling", "loop", "device"])
def test_what_is_no_text(sort: str, tmp_path: Path) -> None:
    for each in ("valid", "test"):
        (tmp_path / f"{each}.txt").write_bytes(GOOD)
    path = tmp_path / "train.txt"
    {
        "pipe": lambda: os.mkfifo(path), "folder": lambda: path.mkdir(), "dangling": lambda: path.symlink_to("nowhere"),
        "loop": lambda: path.symlink_to("train.txt"), "device": lambda: path.symlink_to("/dev/zero"),
    }[sort]()  # fmt: skip
    words = ["demo", *TINY, "data.source=folder", f"data.text_dir={tmp_path}", f"run_dir={tmp_path / 'run'}"]
    done = command("data", "prepare", *words)
    has_manners(done)
    assert done.code in (1, 2) and "train" in done.told[0], done


def tried(data: st.DataObject, folder: Path) -> None:
    """Bytes, or a text that is there, under any name of a text."""
    text = data.draw(st.one_of(st.sampled_from([*TEXTS.values()]), st.binary(max_size=300), st.text().map(_as_utf8)))
    split = data.draw(st.sampled_from(["train", "valid", "test"]))
    name, verb = data.draw(st.sampled_from(NAMES)), data.draw(st.sampled_from(["data prepare", "data shard"]))
    judged(prepared(folder, text, name, split, verb), folder, split)


def _as_utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@times(8)
@given(data=st.data())
def test_texts(data: st.DataObject, tmp_path_factory: Factory) -> None:
    tried(data, tmp_path_factory.getbasetemp() / "fuzz-texts")


@pytest.mark.slow
@times(200)
@given(data=st.data())
def test_texts_at_length(data: st.DataObject, tmp_path_factory: Factory) -> None:
    tried(data, tmp_path_factory.getbasetemp() / "fuzz-texts")
