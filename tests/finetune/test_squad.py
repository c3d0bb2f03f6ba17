"""SQuAD: its files, windows of its paragraphs, and answers from scores."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.finetune import vocabulary

from distlm.data.shards.wordpiece import WordPiece
from distlm.errors import DistlmError
from distlm.finetune.tasks.features import Frame, encode_squad, window_starts
from distlm.finetune.tasks.metrics import squad_scores
from distlm.finetune.tasks.spans import CANDIDATES, Candidates, decode_answers
from distlm.finetune.tasks.squad import Squad, read_squad
from distlm.models.plm.config import FinetuneConfig

CONTEXT = "word1 good1 bad1. Word2, word3 word4 word5 word6 word7 word8 word9 good2 bad2 word10?"


def article(*questions: tuple[str, str, list[tuple[str, int]]], context: str = CONTEXT) -> dict[str, Any]:
    asked = [
        {"id": name, "question": text, "answers": [{"text": a, "answer_start": s} for a, s in answers]}
        for name, text, answers in questions
    ]
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": asked}]}]}


GIVEN = article(
    ("q1", "word1 word2?", [("good1 bad1", CONTEXT.index("good1")), ("bad1", CONTEXT.index("bad1"))]),
    ("q2", "word3?", [("good2 bad2", CONTEXT.index("good2"))]),
)


def write(folder: Path, train: dict[str, Any], dev: dict[str, Any]) -> FinetuneConfig:
    (folder / "train-v1.1.json").write_text(json.dumps(train), "utf-8")
    (folder / "dev-v1.1.json.gz").write_bytes(gzip.compress(json.dumps(dev).encode()))
    return FinetuneConfig(task="SQuAD", data_dir=str(folder))


def test_plain_and_gzipped_files(tmp_path: Path) -> None:
    splits = read_squad(write(tmp_path, GIVEN, article(("q3", "w", [("word1", 0)]))))
    train = splits["train"]
    assert train.contexts == [CONTEXT] and [q.id for q in train.questions] == ["q1", "q2"]
    first = train.questions[0]
    assert first.answers == ("good1 bad1", "bad1") and CONTEXT[first.start : first.end] == "good1 bad1"
    assert len(splits["dev"]) == 1 and train.misplaced == 0


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (article(("q9", "w", [])), "question q9 has no answer; finetune.task=SQuAD is SQuAD 1.1"),
        (article(("q1", "w", [("word2", 1)])), "1 of 1 first answers of train are not at their answer_start"),
        ({"data": [{"title": "t"}]}, r"train-v1\.1\.json: not SQuAD's format: KeyError 'paragraphs'"),
        ({"data": []}, r"train-v1\.1\.json: no questions"),
    ],
)
def test_wrong_files_are_refused(train: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match=message):
        read_squad(write(tmp_path, train, GIVEN))


def test_missing_and_cut_files_are_named(tmp_path: Path) -> None:
    config = write(tmp_path, GIVEN, GIVEN)
    (tmp_path / "dev-v1.1.json.gz").write_bytes((tmp_path / "dev-v1.1.json.gz").read_bytes()[:60])
    with pytest.raises(DistlmError, match=r"dev-v1\.1\.json\.gz: not a readable JSON file"):
        read_squad(config)
    (tmp_path / "dev-v1.1.json.gz").unlink()
    with pytest.raises(DistlmError, match=r"no dev-v1\.1\.json or dev-v1\.1\.json\.gz in it"):
        read_squad(config)


def test_the_datasets_library_gives_the_same_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the hub extra is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config = write(tmp_path, GIVEN, GIVEN)
    folder = tmp_path / "local"
    folder.mkdir()
    rows = [
        {"id": q["id"], "context": CONTEXT, "question": q["question"],
         "answers": {key: [a[key] for a in q["answers"]] for key in ("text", "answer_start")}}
        for q in GIVEN["data"][0]["paragraphs"][0]["qas"]
    ]  # fmt: skip
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert read_squad(FinetuneConfig(task="SQuAD", source="hub", hub_name=str(folder))) == read_squad(config)


def test_window_starts() -> None:
    assert window_starts(10, 10, 4) == [0]
    assert window_starts(11, 10, 4) == [0, 4]
    assert window_starts(30, 10, 4) == [0, 4, 8, 12, 16, 20]
    # No token is left out when the stride is longer than a window.
    assert window_starts(25, 10, 128) == [0, 10, 20]
    assert window_starts(0, 10, 4) == [0]


def windows_of(folder: Path, squad: Squad, length: int, stride: int, train: bool = True):
    wordpiece = vocabulary(folder)
    tokenizer = wordpiece.tokenizer()
    return wordpiece, encode_squad(tokenizer, Frame.of(tokenizer, 0), squad, length, stride, train)


def test_windows_hold_question_window_and_the_answers_place(tmp_path: Path) -> None:
    squad = read_squad(write(tmp_path, GIVEN, GIVEN))["train"]
    wordpiece, windows = windows_of(tmp_path / "v", squad, 14, 4)
    rows = windows.rows
    assert rows.lengths.max() == 14
    for number in range(len(rows)):
        question = squad.questions[windows.question[number]]
        pieces = [wordpiece.pieces[i] for i in rows.ids[rows.bounds[number] : rows.bounds[number + 1]]]
        assert pieces[0] == "[CLS]" and pieces[rows.second[number] - 1] == "[SEP]" == pieces[-1]
        first, last = rows.labels[number]
        words = question.answers[0].split()
        if first:
            assert pieces[first : last + 1] == words
        else:
            assert not any(pieces[i : i + 2] == words for i in range(rows.second[number], len(pieces)))
    # Every answer lies in some window.
    assert {int(q) for q, label in zip(windows.question, rows.labels, strict=True) if label[0]} == {0, 1}


def test_a_row_without_room_for_the_paragraph_is_refused(tmp_path: Path) -> None:
    squad = read_squad(write(tmp_path, GIVEN, GIVEN))["train"]
    with pytest.raises(DistlmError, match=r"finetune\.length=5: no room beside question q1"):
        windows_of(tmp_path / "v", squad, 5, 4)


def test_training_leaves_out_answers_that_cannot_be_found(tmp_path: Path) -> None:
    squad = read_squad(write(tmp_path, GIVEN, GIVEN))["dev"]
    lost = Squad(squad.contexts, [squad.questions[0], squad.questions[1].__class__("q2", "word3?", 0, ("x",), -1)])
    assert set(windows_of(tmp_path / "v", lost, 40, 8, train=True)[1].question.tolist()) == {0}
    assert set(windows_of(tmp_path / "v", lost, 40, 8, train=False)[1].question.tolist()) == {0, 1}


def perfect(windows: Any) -> Candidates:
    """Scores of a model that knows the answers: 1 at their ends, 0 elsewhere, -1 in windows without one."""
    count = len(windows.rows)
    scores = np.full((count, 2, CANDIDATES), -1.0)
    places = np.broadcast_to(windows.rows.second[:, None, None], scores.shape).copy()
    places[:, :, 0] = np.maximum(windows.rows.labels, windows.rows.second[:, None])
    scores[:, :, 0] = (windows.rows.labels[:, :1] > 0) * 2.0 - 1
    return Candidates(scores, places)


def test_decoding_finds_what_the_scores_say(tmp_path: Path) -> None:
    squad = read_squad(write(tmp_path, GIVEN, GIVEN))["train"]
    _, windows = windows_of(tmp_path / "v", squad, 14, 4)
    assert decode_answers(squad, windows, perfect(windows), 30) == {"q1": "good1 bad1", "q2": "good2 bad2"}
    # Neither too long nor backwards: with one token at most, the next best is taken.
    short = decode_answers(squad, windows, perfect(windows), 1)
    assert all(len(text.split()) <= 1 for text in short.values())
    nothing = Candidates(
        np.full((len(windows.rows), 2, CANDIDATES), -np.inf), np.zeros((len(windows.rows), 2, 20), int)
    )
    assert decode_answers(squad, windows, nothing, 30) == {"q1": "", "q2": ""}


@pytest.mark.data
def test_a_perfect_model_gets_full_marks_on_the_real_dev_set() -> None:
    folder = Path(os.environ.get("DISTLM_TEST_DATA", ""))
    if not (folder / "squad" / "dev-v1.1.json.gz").is_file():
        pytest.skip("no SQuAD: set DISTLM_TEST_DATA to a folder that holds squad/dev-v1.1.json.gz")
    from distlm.finetune.tasks.squad import _file_rows, _squad

    squad = _squad(_file_rows(folder / "squad" / "dev-v1.1.json.gz"), "dev")
    assert (len(squad), len(squad.contexts), squad.misplaced) == (10570, 2067, 0)
    assert sum(len(question.answers) for question in squad.questions) == 34726
    some = Squad(squad.contexts, squad.questions[::8])
    tokenizer = WordPiece.load(folder / "bert-vocab", True).tokenizer()
    windows = encode_squad(tokenizer, Frame.of(tokenizer, 0), some, 384, 128, train=False)
    found = squad_scores(decode_answers(some, windows, perfect(windows), 60), some.questions)
    # A few answers begin or end within a piece.
    assert found["exact_match"] > 0.99 and found["f1"] > 0.995
