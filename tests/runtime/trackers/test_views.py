"""TensorBoard and W&B show what metrics.jsonl says, one value a step, whatever was killed and started again."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path

import pytest
import wandb
from support.deadline import DEADLINE_S
from support.foreign.trackers import Curve, scalars, wandb_curve, wandb_file, wandb_records, wandb_rows

from distlm.runtime.metrics import TRAIN_LOSS, VALID_LOSS, Line, MetricsFile, followed, points
from distlm.runtime.trackers import wandb as module
from distlm.runtime.trackers.follower import Follower, View
from distlm.runtime.trackers.tensorboard import TensorBoardView
from distlm.runtime.trackers.wandb import WandbView, is_offline


@pytest.fixture(autouse=True)
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # It reads the environment once a process.
    wandb.teardown()
    yield
    wandb.teardown()


def alone(test: Callable[..., None]) -> Callable[..., None]:
    """The test in a process of its own: W&B keeps a connection and settings in its process, and what other tests of the
    same one had left there has kept its rows out of the file."""

    @wraps(test)
    def run(**fixtures: object) -> None:
        if "DISTLM_TEST_ALONE" in os.environ:
            test(**fixtures)
            return
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{test.__name__}"]
        done = subprocess.run(
            command, env={**os.environ, "DISTLM_TEST_ALONE": "1"}, capture_output=True, text=True, timeout=DEADLINE_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def start(record: MetricsFile, views: Sequence[View], steps: Sequence[int], killed: bool = False) -> Follower:
    """One start of a training that logs at these updates and validates at every third."""
    follower = Follower(record.path, views)
    follower.update()
    with followed(follower.told):
        for step in steps:
            record.write("train", {TRAIN_LOSS: 8 / (1 + step), "train/context": "words"}, step=step)
            if step % 3 == 0:
                record.write("train", {VALID_LOSS: 9 / (1 + step)}, step=step)
                record.write("train", {"progress/done": step, "progress/eta_s": None})
    if not killed:
        follower.close(failed=False)
    return follower


def both(run: Path) -> list[View]:
    return [TensorBoardView(run / "tensorboard"), WandbView(run / "wandb", "name", {"train": {"lr": 0.5}})]


def curves(run: Path) -> Iterator[tuple[str, Curve, Curve, Curve]]:
    """Name, and its curve by the record, TensorBoard and W&B."""
    lines = list(MetricsFile(run / "metrics.jsonl").read("train"))
    board, rows = scalars(run / "tensorboard" / "train"), wandb_rows(wandb_file(run))
    for name in (TRAIN_LOSS, VALID_LOSS):
        yield name, points(lines, name), board[name], sorted(wandb_curve(rows, name))


@alone
def test_the_curve_after_a_kill_is_the_curve_without(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for run in (whole, killed):
        run.mkdir()
    start(MetricsFile(whole / "metrics.jsonl"), both(whole), range(1, 21))
    record = MetricsFile(killed / "metrics.jsonl")
    record.write("prepare", {"stage/seconds": 1.5})
    # Killed at 12, resumed from 6 and killed at 9, resumed from 6 once more.
    views = both(killed)
    start(record, views, range(1, 13), killed=True)
    # Its process is gone with all that it held.
    views[1].close(failed=True)
    second = both(killed)
    start(record, second, range(7, 10), killed=True)
    second[1].close(failed=True)
    start(record, both(killed), range(7, 21))
    for (name, truth, board, rows), (_, same, _, _) in zip(curves(killed), curves(whole), strict=True):
        assert truth == same and rows == truth, name
        assert board == [(step, pytest.approx(value, rel=1e-6)) for step, value in truth], name
    assert wandb_file(killed).stem == f"run-{json.loads((killed / 'wandb' / 'run.json').read_text())['id']}"
    assert scalars(killed / "tensorboard" / "prepare") == {"stage/seconds": [(0, 1.5)]}


@alone
def test_wandb_has_every_value_under_its_name_its_time_and_the_step_as_axis(tmp_path: Path) -> None:
    record = MetricsFile(tmp_path / "metrics.jsonl")
    start(record, both(tmp_path), range(1, 4))
    lines = list(record.read())
    rows = wandb_rows(wandb_file(tmp_path))
    assert [row["_step"] for row in rows] == list(range(len(lines)))
    for row, line in zip(rows, lines, strict=True):
        shown = {name: value for name, value in row.items() if not name.startswith("_")}
        there = {name: value for name, value in line.values.items() if value is not None}
        assert shown == {**there, "stage": "train", **({} if line.step is None else {"step": line.step})}
        assert row["_timestamp"] == pytest.approx(line.time, abs=1e-3)
    records = wandb_records(wandb_file(tmp_path))
    assert {(r.metric.glob_name, r.metric.step_metric) for r in records if r.HasField("metric")} == {("*", "step")}
    (told,) = (r.run for r in records if r.HasField("run"))
    assert (told.display_name, {u.key: u.value_json for u in told.config.update}["train"]) == ("name", '{"lr":0.5}')


@alone
def test_a_server_that_does_not_answer_leaves_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On many clusters the user is logged in and compute nodes have no way out."""
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(module, "PATIENCE_S", 1.0)
    monkeypatch.setattr(module, "_unreachable", False)
    start(MetricsFile(tmp_path / "metrics.jsonl"), both(tmp_path)[1:], range(1, 4))
    assert "W&B cannot be reached, so wandb is offline" in capsys.readouterr().err
    assert [row["step"] for row in wandb_rows(wandb_file(tmp_path)) if TRAIN_LOSS in row] == [1, 2, 3]


def test_online_only_the_rows_that_the_server_lacks_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server: dict[int, int] = {}

    class Online:
        offline = False

        def __init__(self) -> None:
            self.step = len(server)

        def log(self, row: dict[str, int], step: int, commit: bool) -> None:
            assert commit and step not in server
            server[step] = row["step"]

        def define_metric(self, *_: object, **__: object) -> None: ...

        def finish(self, exit_code: int) -> None: ...

    monkeypatch.setattr(WandbView, "_init", lambda *_: Online())
    monkeypatch.setattr(module, "is_offline", lambda: False)
    record = MetricsFile(tmp_path / "metrics.jsonl")
    # Without validations and progress: one line a step.
    start(record, both(tmp_path)[1:], [1, 2, 4, 5], killed=True)
    start(record, both(tmp_path)[1:], [4, 5, 7, 8])
    assert server == dict(enumerate([1, 2, 4, 5, 7, 8]))


class Recorder:
    """A view that keeps what it is told."""

    name = "recorder"

    def __init__(self, folder: Path, broken: bool = False) -> None:
        self.folder, self.broken = folder, broken
        self.renewals, self.shown, self.closed = 0, list[Line](), 0

    def renew(self, lines: Sequence[Line]) -> None:
        self.renewals += 1
        self.shown = list(lines)

    def add(self, line: Line) -> None:
        if self.broken:
            raise OSError("no space left\non this disk")
        self.shown.append(line)

    def close(self, failed: bool) -> None:
        self.closed += 1


def test_repeated_steps_make_a_view_anew_once(tmp_path: Path) -> None:
    record, view = MetricsFile(tmp_path / "metrics.jsonl"), Recorder(tmp_path)
    start(record, [Recorder(tmp_path)], range(1, 11))
    start(record, [view], range(5, 16))
    assert view.renewals == 2, "at its start, and when the training had got past update 10"
    assert sorted(map(repr, view.shown)) == sorted(map(repr, record.read()))


def test_what_has_other_steps_after_a_resume_is_shown_by_rising_step(tmp_path: Path) -> None:
    """train.log_every may change between two starts."""
    record = MetricsFile(tmp_path / "metrics.jsonl")
    start(record, [Recorder(tmp_path)], [2, 4, 6, 8])
    start(record, [TensorBoardView(tmp_path / "tensorboard")], [5, 10])
    assert [step for step, _ in scalars(tmp_path / "tensorboard" / "train")[TRAIN_LOSS]] == [2, 4, 5, 6, 8, 10]


def test_a_training_that_ends_before_it_got_past_is_shown_at_its_end(tmp_path: Path) -> None:
    record, view = MetricsFile(tmp_path / "metrics.jsonl"), Recorder(tmp_path)
    start(record, [Recorder(tmp_path)], range(1, 11))
    start(record, [view], [5])
    assert sorted(map(repr, view.shown)) == sorted(map(repr, record.read()))


def test_lines_of_another_process_are_shown_and_half_a_line_waits(tmp_path: Path) -> None:
    record, view = MetricsFile(tmp_path / "metrics.jsonl"), Recorder(tmp_path)
    follower = start(record, [view], [1], killed=True)
    # No followed() here: as another process would write.
    record.write("knn search", {"stage/seconds": 3.0})
    text = json.dumps({"time": 5, "stage": "train", "step": 2, TRAIN_LOSS: 1.0})
    with record.path.open("a") as stream:
        stream.write(text[:20])
        stream.flush()
        follower.update()
        assert [line.stage for line in view.shown] == ["train", "knn search"]
        stream.write(text[20:] + "\n")
    follower.update()
    assert [line.step for line in view.shown] == [1, None, 2]


def test_a_view_that_fails_is_left_off_with_one_line_and_the_other_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, broken, sound = MetricsFile(tmp_path / "metrics.jsonl"), Recorder(tmp_path, True), Recorder(tmp_path)
    start(record, [broken, sound], range(1, 5))
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "train.trackers: recorder is left off until the next start, which makes it anew from metrics.jsonl: OSError: "
        "no space left"
    ]
    assert (broken.shown, broken.closed, sound.closed) == ([], 1, 1) and len(sound.shown) == len(list(record.read()))


def test_wandb_is_offline_unless_the_user_is_logged_in_or_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert is_offline()
    (home / ".netrc").write_text("machine example.org login user password secret\n")
    (home / ".netrc").chmod(0o600)
    assert is_offline()
    monkeypatch.setenv("WANDB_BASE_URL", "https://example.org")
    wandb.teardown()
    assert not is_offline()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert is_offline()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_BASE_URL")
    wandb.teardown()
    assert not is_offline()
    monkeypatch.delenv("WANDB_MODE")
    assert is_offline()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert not is_offline()
