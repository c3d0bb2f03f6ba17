"""Change of the loss by word: sums, order, CSV, text, and the command."""

import csv
import math

import numpy as np
import pytest
from support import distlm

from distlm.analysis.words import open_evaluation, word_changes, words_table, write_csv
from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError
from distlm.knnlm.evaluate.losses import Losses, write_losses
from distlm.runtime.rundir import RunDir

WORDS = Dictionary(["the", "Meridian", "of", "never"], [9, 3, 2, 1])
THE, MERIDIAN, OF = 4, 5, 6
TARGETS = np.array([THE, MERIDIAN, THE, OF, MERIDIAN, THE])
LM = np.log([0.5, 0.01, 0.5, 0.25, 0.01, 0.25])
CACHE = np.log([0.25, 0.08, 0.25, 0.25, 0.16, 0.25])


def evaluation(root, name="valid", targets=TARGETS, **log_probs):
    run = RunDir(root)
    write_losses(root / "losses", name, targets, log_probs or {"lm": LM, "cache": CACHE}, WORDS, "all", "m", "t")
    return run


def test_sums_by_word_most_improved_first(tmp_path):
    run = evaluation(tmp_path)
    before, after = (Losses.open(run.losses, "valid", name) for name in ("lm", "cache"))
    rows = word_changes(before, after)
    assert [(row.word, row.count) for row in rows] == [("Meridian", 2), ("of", 1), ("the", 3)]
    assert [row.change for row in rows] == pytest.approx([math.log(8 * 16), 0.0, -2 * math.log(2)])
    assert math.fsum(row.before for row in rows) == pytest.approx(-LM.sum())
    assert math.fsum(row.before - row.after - row.change for row in rows) == pytest.approx(0.0, abs=1e-12)


def test_first_tokens_can_be_left_out(tmp_path):
    run = evaluation(tmp_path)
    before, after = (Losses.open(run.losses, "valid", name) for name in ("lm", "cache"))
    rows = word_changes(before, after, skip=3)
    assert {row.word: row.count for row in rows} == {"of": 1, "Meridian": 1, "the": 1}
    for skip in (-1, 6):
        with pytest.raises(DistlmError, match=f"--skip {skip}"):
            word_changes(before, after, skip)


def test_csv_and_text(tmp_path):
    run = evaluation(tmp_path)
    lm, cache = (Losses.open(run.losses, "valid", name) for name in ("lm", "cache"))
    rows = word_changes(lm, cache)
    write_csv(rows, tmp_path / "words.csv")
    with (tmp_path / "words.csv").open(encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    assert [row["word"] for row in read] == ["Meridian", "of", "the"]
    assert [float(row["change_nats"]) for row in read] == [row.change for row in rows]
    table = words_table(rows, 20, "valid").splitlines()
    before, after = (math.exp(-part.mean()) for part in (LM, CACHE))
    assert f"6 tokens, perplexity per token {before:.2f} → {after:.2f}" in table[0]
    assert table[-1].split() == ["the", "3", "-1.39", "Meridian", "2", "+4.85"]
    assert len(table) == 4


def test_two_runs_are_compared_and_other_tokens_refused(tmp_path):
    one, other = evaluation(tmp_path / "a"), evaluation(tmp_path / "b", lm=CACHE)
    after = open_evaluation(f"{other.root}:lm", one, "valid")
    assert [row.word for row in word_changes(open_evaluation("lm", one, "valid"), after)] == ["Meridian", "of", "the"]
    third = evaluation(tmp_path / "c", targets=TARGETS[::-1])
    with pytest.raises(DistlmError, match="not of the same tokens"):
        word_changes(after, open_evaluation("lm", third, "valid"))


def test_bad_names_say_what_there_is(tmp_path):
    run = evaluation(tmp_path)
    with pytest.raises(DistlmError, match="no losses of 'knn'; there are lm, cache"):
        open_evaluation("knn", run, "valid")
    with pytest.raises(DistlmError, match=r"'pointer': expected lm, cache, knn, .*both.*, or RUN_DIR:NAME"):
        open_evaluation("pointer", run, "valid")
    with pytest.raises(DistlmError, match="no losses of split test; there are valid"):
        open_evaluation("lm", run, "test")
    with pytest.raises(DistlmError, match="run `distlm knn evaluate` first"):
        open_evaluation(f"{tmp_path}/nowhere:lm", run, "valid")


def test_the_command_writes_the_file_and_prints_the_table(tmp_path):
    evaluation(tmp_path)
    done = distlm("report", "words", "demo", f"run_dir={tmp_path}", "--before", "lm", "--after", "cache", "--top", "5")
    assert "Meridian" in done.stdout
    assert (tmp_path / "words-valid-lm-cache.csv").is_file()
    refused = distlm("report", "words", "demo", f"run_dir={tmp_path}", "--after", "both", check=False)
    assert refused.returncode == 1
    assert "no losses of 'both'; there are lm, cache" in refused.stderr
