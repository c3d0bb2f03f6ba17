"""The stage on one rank: metrics, checkpoints and what is kept, refusals, the validation number, the plan."""

import fcntl
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.records import unsealed
from support.train import curve, newest, settings, tiny_config, tiny_tokens

from distlm.config import load_config
from distlm.config.training import BlocksConfig
from distlm.data.blocks import training_blocks
from distlm.data.order import rows_for_update
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError, Stopped
from distlm.models.io import load_model
from distlm.optim.schedule import learning_rate
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import open_stage
from distlm.training.loop import plan_train, run_train
from distlm.training.objective import TrainModule
from distlm.training.validate import Validation, Validator


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokens(tmp_path_factory.mktemp("train"))


def run(tokens: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    with open_stage("train", tiny_config(tokens, folder, *overrides)) as stage:
        return run_train(stage)


@pytest.fixture(scope="module")
def finished(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of 12 updates that saves every 2, validates every 3 and keeps 2."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run(tokens, folder, "train.save_every=2", "train.valid_every=3", "train.l2_weight=0.1")


def test_summary_and_metrics(finished: tuple[Path, dict[str, Any]], tokens: Path) -> None:
    folder, summary = finished
    assert summary.keys() == {
        "step", "train_loss", "valid_loss", "valid_ppl", "tokens_per_s", "parameters", "seconds"
    }  # fmt: skip
    assert summary["step"] == 12
    assert summary["parameters"] == 19344
    assert summary["valid_ppl"] == pytest.approx(np.exp(summary["valid_loss"]))
    assert list(curve(folder)) == list(range(1, 13))
    assert list(curve(folder, "valid/loss")) == list(curve(folder, "perf/valid_s")) == [3, 6, 9, 12]
    assert {2, 4, 6, 8, 10, 12} <= curve(folder, "perf/save_s").keys()
    train = tiny_config(tokens, folder).section(BlocksConfig)
    assert curve(folder, "train/lr") == {step: learning_rate(train, step - 1) for step in range(1, 13)}
    # After layer norm with its initial gain 1, the mean square of the tapped state is 1.
    assert curve(folder, "train/l2_penalty")[1] == pytest.approx(1, rel=1e-3)
    assert curve(folder, "train/tap_norm")[1] == pytest.approx(32**0.5, rel=1e-3)
    assert curve(folder, "stage/seconds")[12] > 0


def test_best_and_newest_checkpoints_are_kept(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    valid = curve(folder, "valid/loss")
    best, before = (min(range(3, last + 1, 3), key=lambda step: valid[step]) for last in (12, 10))
    kept = {path.name for path in (folder / "checkpoints").glob("step-*")}
    assert kept == {f"step-{step:08d}" for step in (10, 12, best, before)}
    pointer = unsealed(folder / "checkpoints" / "best.json")
    assert pointer == {"format": 1, "checkpoint": f"step-{best:08d}", "valid_loss": valid[best]}
    assert {path.name for path in newest(folder).iterdir()} == {
        "model.safetensors", "model.json", "optimizer.safetensors", "state.json", "complete.json"
    }  # fmt: skip


def test_finished_run_does_nothing_and_repeats_its_summary(finished: tuple[Path, dict[str, Any]], tokens: Path) -> None:
    folder, summary = finished
    before = {path: path.stat().st_mtime_ns for path in newest(folder).iterdir()}
    again = run(tokens, folder, "train.save_every=2", "train.valid_every=3", "train.l2_weight=0.1")
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    assert before == {path: path.stat().st_mtime_ns for path in newest(folder).iterdir()}


def test_best_json_is_restored_from_the_checkpoint(finished: tuple[Path, dict[str, Any]], tokens: Path) -> None:
    """A kill between the checkpoint and best.json loses nothing."""
    folder, _ = finished
    pointer = folder / "checkpoints" / "best.json"
    before = pointer.read_text("utf-8")
    pointer.unlink()
    run(tokens, folder, "train.save_every=2", "train.valid_every=3", "train.l2_weight=0.1")
    assert pointer.read_text("utf-8") == before


def test_validation_number_by_hand(finished: tuple[Path, dict[str, Any]], tokens: Path) -> None:
    """Each line-packed block of at most 32 tokens with the 32 before it, one by one, in full log-probabilities."""
    folder, summary = finished
    model, card = load_model(newest(folder))
    files = TokenFiles.open(tokens)
    assert card.dictionary == files.dictionary.hash
    assert card.step == 12
    ids = np.asarray(files.split("valid"), dtype=np.int64)
    total, at = 0.0, 0
    while at < len(ids):
        ends = [end for end in range(at + 1, min(at + 32, len(ids)) + 1) if ids[end - 1] == 2 or end == len(ids)]
        end = ends[-1] if ends else at + 32
        first = max(at - 32, 0)
        words = np.concatenate([[ids[first - 1] if first else 2], ids[first:end]])
        with torch.no_grad():
            hidden = model(torch.from_numpy(words[:-1])[None]).hidden
            log_probs = model.full_log_probs(hidden[0, at - first :]).double()
        total -= float(log_probs[torch.arange(end - at), torch.from_numpy(ids[at:end])].sum())
        at = end
    assert summary["valid_loss"] == pytest.approx(total / len(ids), rel=1e-6)


def test_the_data_s_fingerprint_goes_on_over_a_stop(tokens: Path, tmp_path: Path) -> None:
    run(tokens, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tokens, tmp_path / "cut", "train.max_updates_this_run=5")
    run(tokens, tmp_path / "cut")
    run(tokens, tmp_path / "larger", "train.micro_blocks=2")
    whole = curve(tmp_path / "whole", "train/data_fingerprint")
    assert len(set(whole.values())) == 12
    for other in ("cut", "larger"):
        assert curve(tmp_path / other, "train/data_fingerprint") == whole
    run(tokens, tmp_path / "seed", "train.seed=2")
    assert not set(curve(tmp_path / "seed", "train/data_fingerprint").values()) & set(whole.values())


def test_stop_after_some_updates_says_where(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(
        Stopped, match=r"stopped after update 5 of 12; .*step-00000005 is complete, run the same command"
    ):
        run(tokens, tmp_path / "run", "train.max_updates_this_run=5")
    assert newest(tmp_path / "run").name == "step-00000005"
    assert Stopped.exit_code == 75


def test_lines_of_metrics_are_means_over_the_updates_between(tokens: Path, tmp_path: Path) -> None:
    run(tokens, tmp_path / "every", "train.updates=8", "train.valid_every=0")
    run(tokens, tmp_path / "third", "train.updates=8", "train.valid_every=0", "train.log_every=3")
    each, third = curve(tmp_path / "every"), curve(tmp_path / "third")
    assert list(third) == [3, 6, 8]
    train = tiny_config(tokens, tmp_path / "run").section(BlocksConfig)
    blocks = training_blocks(len(TokenFiles.open(tokens).split("train")), train.tokens_per_sample)
    counts = {step: blocks.scored[rows_for_update(train.seed, step - 1, 4, len(blocks))].sum() for step in each}
    for end, steps in ((3, (1, 2, 3)), (6, (4, 5, 6)), (8, (7, 8))):
        weights = [counts[step] for step in steps]
        assert third[end] == pytest.approx(np.average([each[step] for step in steps], weights=weights))


def test_damaged_checkpoint_is_refused(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tokens, tmp_path / "run", "train.max_updates_this_run=5")
    path = newest(tmp_path / "run") / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    for bad, said in ((content[:-4], "damaged"), (None, "damaged .missing")):
        path.write_bytes(bad) if bad else path.unlink()
        with pytest.raises(DistlmError, match=f"optimizer.safetensors: {said}.*delete .*step-00000005 to continue"):
            run(tokens, tmp_path / "run")
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DistlmError, match="other content"):
        run(tokens, tmp_path / "run")
    # The mend that the message names: the one before.
    shutil.rmtree(path.parent)
    assert run(tokens, tmp_path / "run")["step"] == 12


def test_the_checkpoint_before_has_its_best_one_too(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who deletes the newest one, as the messages advise, goes on from a run that is whole."""
    losses = iter([3.0, 9.0, 9.0, 9.0, 1.0, *[9.0] * 9])
    monkeypatch.setattr(Validator, "run", lambda *_: Validation(next(losses), 1, ""))
    extra = "train.save_every=1", "train.valid_every=2"
    with pytest.raises(Stopped):
        run(tokens, tmp_path / "run", *extra, "train.max_updates_this_run=10")
    kept = [path.name for path in sorted((tmp_path / "run/checkpoints").glob("step-*"))]
    assert kept == ["step-00000002", "step-00000009", "step-00000010"]
    shutil.rmtree(tmp_path / "run/checkpoints" / kept[-1])
    assert run(tokens, tmp_path / "run", *extra)["step"] == 12
    assert RunDir(tmp_path / "run").best_checkpoint().name == "step-00000002"
    left = [path.name for path in sorted((tmp_path / "run/checkpoints").glob("step-*"))]
    assert left == ["step-00000002", "step-00000011", "step-00000012"]


def test_second_run_in_the_same_folder_is_refused(tokens: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    with (checkpoints / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DistlmError, match=r"checkpoints: another run is training here .*; wait for it"):
            run(tokens, tmp_path / "run")
    assert run(tokens, tmp_path / "run")["step"] == 12


def test_other_data_under_a_checkpoint_is_refused(tmp_path: Path) -> None:
    tokens = tiny_tokens(tmp_path / "one")
    with pytest.raises(Stopped):
        run(tokens, tmp_path / "run", "train.max_updates_this_run=5")
    other = tiny_tokens(tmp_path / "two", seed=1)
    shutil.rmtree(tokens)
    shutil.copytree(other, tokens)
    with pytest.raises(DistlmError, match=r"the token files \(fingerprint\) differs: .* another run_dir="):
        run(tokens, tmp_path / "run")


def test_loss_that_is_not_finite_names_the_update(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match=r"update \d+: the (loss is|gradient is not).*lower train.lr") as caught:
        run(tokens, tmp_path / "run", "train.lr=1e38", "train.optimizer=nag", "train.clip_norm=0")
    assert caught.value.shared
    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        weights = load_model(folder)[0].state_dict()
        assert all(bool(value.isfinite().all()) for value in weights.values())


@pytest.mark.parametrize("stage", [0, 2])
def test_a_gradient_that_is_lost_ends_the_run_at_its_update(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """With a loss that is finite: nothing of that update reaches a checkpoint, and the run goes on from before it."""
    loss, calls = TrainModule.loss, []

    def lost(*given: Any) -> torch.Tensor:
        calls.append(given)
        return loss(*given) * (float("nan") if len(calls) == 3 * 4 else 1)

    monkeypatch.setattr(TrainModule, "loss", lost)
    extra = f"train.deepspeed=zero{stage}", "train.save_every=1", "train.micro_blocks=1", "train.blocks_per_update=4"
    with pytest.raises(DistlmError, match=r"update 2: the gradient is not finite .*are from before"):
        run(tokens, tmp_path / "run", *extra)
    assert newest(tmp_path / "run").name == "step-00000002"
    assert run(tokens, tmp_path / "run", *extra)["step"] == 12


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.tap=last_layer", "train.tap='last_layer': no such hidden state; choose one of"),
        ("train.deepspeed=zero7", "train.deepspeed=zero7: no such"),
    ],
)
def test_bad_setting_is_refused_before_training(tokens: Path, tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(DistlmError) as caught:
        run(tokens, tmp_path / "run", override)
    assert said in str(caught.value)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_full_disk_is_refused_before_training(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DistlmError, match=r"training needs .* and the disk has 1 B free"):
        run(tokens, tmp_path / "run")


def test_plan_of_the_tiny_run(tokens: Path, tmp_path: Path) -> None:
    config = load_config("demo", settings(tokens, tmp_path / "run"))
    plan = plan_train(config, 2)
    assert "12 updates of 4 blocks x 64 tokens" in plan.work
    assert "2 micro-batches per rank" in plan.work
    # Weights and two Adam states in fp32, two kept, one best, one being written.
    assert plan.disk_bytes == 19344 * 12 * 4
    assert plan.seconds is not None and plan.seconds > 0
    assert plan_train(config, 1).memory_bytes > plan.memory_bytes
    with pytest.raises(DistlmError, match="do not divide over 3 ranks"):
        plan_train(config, 3)


def test_plan_covers_what_is_written(finished: tuple[Path, dict[str, Any]], tokens: Path) -> None:
    folder, _ = finished
    plan = plan_train(tiny_config(tokens, folder), 1)
    written = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    assert written < plan.disk_bytes * 1.1


def test_plan_of_wikitext103_is_the_published_run() -> None:
    plan = plan_train(load_config("wikitext103", ["run_dir=/nonexistent/distlm"]), 8)
    assert "286000 updates of 24 blocks x 3072 tokens" in plan.work
    assert any("V100" in note for note in plan.notes)
    assert any("no token files yet" in note for note in plan.notes)
    # 247 M parameters, weights and momentum in fp32, four checkpoints at once.
    assert plan.disk_bytes == pytest.approx(246.9e6 * 8 * 4, rel=0.1)
