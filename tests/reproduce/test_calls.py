"""results.json names the commands that made what lies in the folder, whatever the call chose that wrote it."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.records import check_record
from support.records.examples import example

from distlm.analysis.results.records import ExperimentResults
from distlm.cli import main
from distlm.config.load import load_config
from distlm.errors import DistlmError, UsageError
from distlm.reproduce.calls import CALLS, commands_of, record_call
from distlm.reproduce.experiment import Experiment, load_experiment
from distlm.reproduce.records import ExperimentCall, ExperimentCalls
from distlm.reproduce.run import run_experiment, write_tables
from distlm.runtime.records import RunCode
from distlm.runtime.rundir import RunDir
from distlm.training.records import LmResults, LmSplit

PLAIN = "distlm reproduce awd-lstm text=/path/to/text"
SEEDS = f"{PLAIN} 'seeds=[2]'"


def opened(tmp_path: Path, *overrides: str, only: Sequence[str] = (), scale: str = "small", **lists: str) -> Experiment:
    text = tmp_path / "text"
    text.mkdir(exist_ok=True)
    return load_experiment("awd-lstm", tmp_path / "runs", {"text": str(text), **lists}, overrides, only, scale)


def evaluated(folder: Path, git: str = "abc1234", second: int = 0) -> None:
    """A finished run: its figures, its code, and a line of what it measured on 2026-01-02."""
    found = example(LmResults)
    found.splits = {split: LmSplit(tokens=9, loss_nats=2.0, perplexity=70.0) for split in ("valid", "test")}
    found.write(folder / "lm.json")
    RunCode(distlm="0.1", git=git, python="3.12", libraries={}).write(folder / "code.json")
    line = {"time": 1767312000 + second, "stage": "train", "train/loss": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n", "utf-8")


def results(experiment: Experiment) -> ExperimentResults:
    write_tables(experiment)
    return ExperimentResults.read(experiment.root / "results.json")


def test_the_record(tmp_path: Path) -> None:
    check_record(example(ExperimentCalls), tmp_path / CALLS)


def test_each_distinct_call_is_recorded_once_with_the_runs_that_it_was_called_for(tmp_path: Path) -> None:
    for experiment in (
        opened(tmp_path, only=["plain-sgd"]),
        opened(tmp_path, only=["awd-lstm"]),
        opened(tmp_path, "launch.threads=2", only=["tokens"]),
        opened(tmp_path, only=["awd-lstm"]),
    ):
        record_call(experiment)
    assert ExperimentCalls.read(tmp_path / "runs" / CALLS).calls == [
        ExperimentCall(PLAIN, ["awd-lstm", "plain-sgd", "tokens", "words"]),
        ExperimentCall(f"{PLAIN} launch.threads=2", ["tokens", "words"]),
    ]


def test_the_command_of_the_most_runs_comes_first(tmp_path: Path) -> None:
    """It is the one that all rows are credited to."""
    for lists in ({"seeds": "[]"}, {"seeds": "[2]"}, {}):
        record_call(opened(tmp_path, **lists))
    assert commands_of(opened(tmp_path)) == [PLAIN, SEEDS, f"{PLAIN} 'seeds=[]'"]


@pytest.mark.parametrize(
    "later",
    [{"only": ["no-ar-tar"]}, {"scale": "quick"}, {"seeds": "[]"}, {}],
    ids=["--only", "--scale", "a list", "the same"],
)
@pytest.mark.parametrize("setting", [(), ("launch.ranks=1",)])
def test_tables_of_another_call_keep_the_commands_of_the_runs(
    tmp_path: Path, later: dict[str, str], setting: tuple[str, ...]
) -> None:
    record_call(opened(tmp_path, seeds="[2]"))
    evaluated(tmp_path / "runs" / "awd-lstm")
    evaluated(tmp_path / "runs" / "no-ar-tar")
    record = results(opened(tmp_path, *setting, **later))
    assert record.commands == [SEEDS]
    assert {row.command for row in record.rows} == {0}
    assert len(ExperimentCalls.read(tmp_path / "runs" / CALLS).calls) == 1


def test_commit_and_day_are_of_all_runs_in_the_folder(tmp_path: Path) -> None:
    for name in ("awd-lstm", "no-ar-tar", "awd-lstm-seed7"):
        evaluated(tmp_path / "runs" / name)
    one = opened(tmp_path, only=["no-ar-tar"])
    assert (results(one).commit, results(one).date) == ("abc1234", "2026-01-02")
    # A run that this call would not make.
    evaluated(tmp_path / "runs" / "awd-lstm-seed7", git="def5678", second=86400)
    assert (results(one).commit, results(one).date) == (None, "2026-01-03")


def test_a_folder_of_an_older_version_has_the_command_of_the_call(tmp_path: Path) -> None:
    evaluated(tmp_path / "runs" / "awd-lstm")
    assert results(opened(tmp_path, seeds="[2]")).commands == [SEEDS]


def test_a_damaged_record_is_named_with_its_mend(tmp_path: Path) -> None:
    evaluated(tmp_path / "runs" / "awd-lstm")
    (tmp_path / "runs" / CALLS).write_text("{", "utf-8")
    for read in (lambda: record_call(opened(tmp_path)), lambda: write_tables(opened(tmp_path))):
        with pytest.raises(DistlmError, match=r"calls\.json: .*delete it"):
            read()


def test_a_call_that_is_refused_is_not_recorded(tmp_path: Path) -> None:
    """Files of the last run but one were made with other settings: found before the first one runs."""
    kept = opened(tmp_path)
    item = kept.items[-2]
    config = load_config(item.recipe, item.settings)
    RunDir(item.folder).open_stage(config, "train")
    RunDir(item.folder).checkpoint(1).mkdir(parents=True)
    other = opened(tmp_path, "train.lr=3")
    with pytest.raises(DistlmError, match=rf"{item.name}: the checkpoints .*train\.lr: 5\.0 there, 3\.0 now"):
        run_experiment(other)
    assert [path.name for path in kept.root.iterdir()] == [item.name]


@pytest.mark.parametrize("splits", ["[test]", "[test,valid]", "[train]"])
@pytest.mark.parametrize("name", ["awd-lstm", "causal-pkm", "knnlm", "regularized-knnlm"])
def test_splits_that_the_tables_cannot_compare_are_refused_before_anything_runs(
    name: str, splits: str, tmp_path: Path
) -> None:
    (tmp_path / "text").mkdir()
    experiment = load_experiment(name, tmp_path / "runs", {"text": str(tmp_path / "text")}, [f"knn.splits={splits}"])
    with pytest.raises(
        UsageError, match=rf"knn\.splits=\{splits[:-1]}\]: .* put it first, e\.g\. 'knn\.splits=\[valid"
    ):
        run_experiment(experiment)
    assert not (tmp_path / "runs").exists()


def test_words_that_cut_valid_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text("a b c\n" * 10, "utf-8")
    words = f"knnlm text={tmp_path / 'text'} words=[40,39] --into {tmp_path / 'runs'}"
    with pytest.raises(SystemExit):
        main(["reproduce", *shlex.split(words)])
    assert "words=[40,39]: 39 words cut not train alone (valid has 40, test has 40" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
