"""Loss by word frequency: bins, means, and the command on a real run."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from support.pictures import description

from distlm.analysis.evaluations import open_evaluations
from distlm.analysis.frequency import loss_by_frequency, report_frequency
from distlm.cli import main
from distlm.config.schema import RunConfig
from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError
from distlm.knnlm.evaluate.losses import Losses, write_losses
from distlm.runtime.rundir import RunDir

WORDS = Dictionary(["the", "of", "Meridian", "never", "absent"], [9, 8, 3, 1, 2])
THE, OF, MERIDIAN, NEVER = 4, 5, 6, 7
TARGETS = np.array([THE, OF, THE, MERIDIAN, NEVER, Dictionary.EOS, Dictionary.UNK, Dictionary.EOS])
LM = np.log([0.5, 0.25, 0.5, 0.1, 0.01, 0.5, 0.25, 0.125])


def evaluation(root: Path, targets: np.ndarray = TARGETS, **log_probs: np.ndarray) -> RunDir:
    run = RunDir(root)
    write_losses(run.losses, "valid", targets, log_probs or {"lm": LM, "knn": LM / 2}, WORDS, "all", "m", "t")
    return run


def test_bins_are_powers_of_two_with_specials_of_their_own(tmp_path: Path) -> None:
    run = evaluation(tmp_path)
    bins = loss_by_frequency(open_evaluations([str(tmp_path)], "valid", ("lm", "knn")))
    assert [(item.label, item.words, item.tokens) for item in bins] == [
        ("</s>", 1, 2), ("<unk>", 1, 1), ("8–15", 2, 3), ("2–3", 1, 1), ("1", 1, 1)
    ]  # fmt: skip
    assert bins[2].nats[0] == pytest.approx(math.log(2 * 2 * 4) / 3)
    assert all(item.nats[1] == pytest.approx(item.nats[0] / 2) for item in bins)
    total = sum(item.tokens * item.nats[0] for item in bins)
    assert total == pytest.approx(Losses.open(run.losses, "valid", "lm").nats.sum())


def test_runs_are_named_and_other_tokens_refused(tmp_path: Path) -> None:
    evaluation(tmp_path / "a")
    evaluation(tmp_path / "b", lm=LM)
    found = open_evaluations([str(tmp_path / "a"), f"{tmp_path / 'b'}:lm"], "valid", ("lm", "knn"))
    assert [item.label for item in found] == ["a: LM", "a: + kNN", "b: LM"]
    again = open_evaluations([str(tmp_path / "a"), f"{tmp_path / 'a'}:lm"], "valid", ("lm", "knn"))
    assert [item.label for item in again] == ["a: LM", "a: + kNN"]
    evaluation(tmp_path / "x" / "a")
    both = open_evaluations([str(tmp_path / "a"), str(tmp_path / "x" / "a")], "valid", ("lm",))
    assert [item.label for item in both] == [f"{tmp_path}/a: LM", f"{tmp_path}/x/a: LM"]
    evaluation(tmp_path / "c", TARGETS[::-1])
    with pytest.raises(DistlmError, match="not of the same tokens"):
        open_evaluations([str(tmp_path / "a"), str(tmp_path / "c")], "valid", ("lm",))
    with pytest.raises(DistlmError, match="there is no such run; give RUN_DIR or RUN_DIR:NAME"):
        open_evaluations([str(tmp_path / "d")], "valid", ("lm",))
    with pytest.raises(DistlmError, match="no losses of 'knn'; there are lm"):
        open_evaluations([f"{tmp_path / 'b'}:knn"], "valid", ("lm",))
    with pytest.raises(DistlmError, match="no losses of split test; there are valid"):
        open_evaluations([str(tmp_path / "b")], "test", ("lm",))


def test_a_real_run_gives_the_figure_and_its_data(finished: RunConfig, tmp_path: Path) -> None:
    text = report_frequency([finished.run_dir], "valid", tmp_path / "figure.png")
    assert "w0-s1: LM, nats" in text and "w0-s1: + kNN, nats" in text
    with (tmp_path / "figure.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    losses = Losses.open(RunDir(Path(finished.run_dir)).losses, "valid", "knn")
    assert sum(int(row["tokens"]) for row in rows) == len(losses.targets)
    assert sum(int(row["tokens"]) * float(row["w0-s1: + kNN"]) for row in rows) == pytest.approx(losses.nats.sum())
    for row in rows:
        apart = float(row["w0-s1: + kNN"]) - float(row["w0-s1: LM"])
        assert float(row["w0-s1: + kNN less w0-s1: LM"]) == pytest.approx(apart, abs=1e-12)
    assert description(tmp_path / "figure.png") in text


@pytest.mark.parametrize(("knn", "said"), [
    (LM / 2, "-0.865 nats per token over all, lower most for 1 (-2.303, 1 token), higher nowhere."),
    (LM * 2, "+1.730 nats per token over all, lower nowhere, higher most for 1 (+4.605, 1 token)."),
])  # fmt: skip
def test_the_sentence_follows_the_difference(knn: np.ndarray, said: str, tmp_path: Path) -> None:
    run = evaluation(tmp_path, lm=LM, knn=knn)
    name = tmp_path.name
    text = report_frequency([str(tmp_path)], "valid", None)
    assert f"Loss of {name}: + kNN less that of {name}: LM: {said}" in text
    assert description(run.root / "frequency-valid.png") in text
    alone = report_frequency([f"{tmp_path}:lm"], "valid", None)
    assert f"The mean loss of {name}: LM is lowest for 8–15" in alone and "highest for 1 (4.61)." in alone
    assert "less" not in (run.root / "frequency-valid.csv").read_text("utf-8")


def test_the_command_takes_run_directories(
    finished: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments, code in (([f"{finished.run_dir}:lm", "--out", str(tmp_path / "f.png")], 0),
                            ([finished.run_dir, "--out", "f.pdf"], 2)):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(["report", "frequency", *arguments])
        assert end.value.code == code
    shown = capfd.readouterr()
    assert "count in train" in shown.out and (tmp_path / "f.csv").is_file()
    assert "--out f.pdf: must end in .png" in shown.err
