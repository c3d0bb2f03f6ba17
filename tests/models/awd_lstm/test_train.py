"""Training an AWD-LSTM on one rank: the loss by hand, phases and metrics, what is kept, refusals, evaluation."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.lstm import lstm_config
from support.present import present
from support.records import unsealed
from support.train import curve, newest, same_end, tiny_tokens

from distlm.config import load_config
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError, Stopped, UsageError
from distlm.models.awd_lstm.bptt import ChunkPlan
from distlm.models.awd_lstm.config import AwdConfig, LstmConfig
from distlm.models.awd_lstm.job import LstmJob, plan_columns
from distlm.models.awd_lstm.model import AwdLstm, Columns
from distlm.models.awd_lstm.objective import StreamModule
from distlm.models.io import load_model
from distlm.runtime.files import read_json
from distlm.runtime.stage import open_stage
from distlm.training.evaluate import run_evaluate
from distlm.training.finished import evaluated_as_trained, trained
from distlm.training.loop import plan_train, run_train


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokens(tmp_path_factory.mktemp("lstm"))


def run(tokens: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    with open_stage("train", lstm_config(tokens, folder, *overrides)) as stage:
        return run_train(stage)


@pytest.fixture(scope="module")
def finished(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Five epochs and two of fine-tuning; keeps every checkpoint."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run(tokens, folder, "train.save_every=40", "train.keep_last=99")


def epochs(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if "train/epoch" in line]


def test_objective_by_hand() -> None:
    """mean CE + α·mean square of the dropped output + β·mean square of the raw output's steps, over the whole chunk."""
    torch.manual_seed(0)
    model = AwdLstm(LstmConfig(layers=2, width=6, hidden_width=7, output_dropout=0.4), 20)
    module = StreamModule(model, 2.0, 1.0).train()
    text = torch.randint(2, 20, (6, 4))
    torch.manual_seed(1)
    parts = []
    for first in (0, 2):
        torch.manual_seed(1)
        sums, states = module(
            text[:-1, first : first + 2], text[1:, first : first + 2], model.zero_states(2), Columns(first, 4)
        )
        parts.append(module.loss(sums, 5, 4, 1.0))
        assert not any(tensor.requires_grad for pair in states for tensor in pair)
    torch.manual_seed(1)
    output = model.stream(text[:-1], model.zero_states(4))
    log_probs = model.full_log_probs(output.dropped.flatten(0, 1))
    ce = -log_probs[torch.arange(20), text[1:].flatten()].mean()
    expected = ce + 2 * output.dropped.square().mean() + (output.raw[1:] - output.raw[:-1]).square().mean()
    assert float(parts[0] + parts[1]) == pytest.approx(float(expected), rel=1e-5)
    expected.backward()
    plain = {name: present(value.grad).clone() for name, value in model.named_parameters()}
    model.zero_grad()
    (parts[0] + parts[1]).backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_phases_metrics_and_summary(finished: tuple[Path, dict[str, Any]], tokens: Path) -> None:
    folder, summary = finished
    lines = epochs(folder)
    assert [line["train/epoch"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    phases = [line["train/phase"] for line in lines]
    assert phases == sorted(phases, key=["sgd", "asgd", "finetune"].index), "one after the other"
    assert phases.count("finetune") == 2 and "asgd" in phases and phases[0] == "sgd"
    fired = [line["train/epoch"] for line in lines if line["trigger/fired"]]
    assert phases.index("asgd") == fired[0], "averaging begins in the epoch after the one that fired"
    switch = lines[fired[0] - 1]
    assert switch["valid/loss"] > switch["trigger/least"] and switch["trigger/rule"] == "masked"
    for line in lines:
        assert line["train/epoch_ppl"] == pytest.approx(math.exp(line["train/epoch_loss"]))
        assert line["perf/epoch_tokens_per_s"] > 0
    assert summary["phase"] == "finetune" and summary["epoch"] == 7
    plan = plan_of(tokens, folder)
    assert [line["step"] for line in lines] == plan.ends.tolist() and summary["step"] == plan.updates
    assert curve(folder, "train/lr") == {u + 1: 20 * plan.chunk(u).drawn / 12 for u in range(plan.updates)}
    assert len(set(curve(folder, "train/data_fingerprint").values())) == plan.updates
    assert trained(lstm_config(tokens, folder), run_dir(tokens, folder))


def run_dir(tokens: Path, folder: Path) -> Any:
    with open_stage("train", lstm_config(tokens, folder, "train.save_every=40", "train.keep_last=99")) as stage:
        return stage.run


def plan_of(tokens: Path, folder: Path) -> ChunkPlan:
    config = lstm_config(tokens, folder)
    length = len(TokenFiles.open(tokens).split("train")) // 8
    return ChunkPlan(length, 12, True, config.train.seed, 5, 2)


def test_checkpoints_hold_the_average_as_the_model_and_the_weights_beside(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = finished
    seen = set()
    for checkpoint in sorted((folder / "checkpoints").glob("step-*")):
        state = read_json(checkpoint / "state.json", "")
        optimizer = load_file(checkpoint / "optimizer.safetensors")
        seen.add(state["phase"])
        if state["phase"] == "sgd":
            assert optimizer == {} and state["optimizer"]["average"] is None
            continue
        model = load_file(checkpoint / "model.safetensors")
        assert {name.removeprefix("weights/") for name in optimizer} == set(model)
        assert state["optimizer"]["group"]["averaged"] >= 0
        if state["optimizer"]["group"]["averaged"] > 2:
            assert not torch.equal(optimizer["weights/embedding"], model["embedding"])
        hidden = checkpoint / "hidden.safetensors"
        ends = curve(folder, "train/epoch")
        assert hidden.exists() == (state["update"] not in ends)
        if hidden.exists():
            tensors = load_file(hidden)
            assert tensors["h.0"].shape == (1, 8, 16) and tensors["c.1"].shape == (1, 8, 12)
    assert seen == {"sgd", "asgd", "finetune"}


def test_averages_are_means_of_the_weights_of_every_update(tokens: Path, tmp_path: Path) -> None:
    """Saved after every update: from the switch on the model is the mean of the weights of averaged updates 2, 3, …"""
    extra = ["train.save_every=1", "train.keep_last=999", "awd.epochs=4", "awd.finetune_epochs=0"]
    extra += ["awd.batch=40", "awd.trigger=window"]
    run(tokens, tmp_path / "run", *extra)
    summed, count = None, 0
    for checkpoint in sorted((tmp_path / "run" / "checkpoints").glob("step-*")):
        averaged = read_json(checkpoint / "state.json", "")["optimizer"]["group"]["averaged"]
        if averaged < 2:
            continue
        weight = load_file(checkpoint / "optimizer.safetensors")["weights/layers.0.weight_hh"].double()
        summed, count = weight if summed is None else summed + weight, count + 1
        mean = load_file(checkpoint / "model.safetensors")["layers.0.weight_hh"]
        torch.testing.assert_close(mean.double(), summed / count, rtol=1e-4, atol=1e-6)
    assert count > 5


def test_best_is_one_running_minimum_over_all_phases(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    valid = curve(folder, "valid/loss")
    best = min(valid, key=lambda step: valid[step])
    pointer = unsealed(folder / "checkpoints" / "best.json")
    assert pointer == {"format": 1, "checkpoint": f"step-{best:08d}", "valid_loss": valid[best]}


def test_validation_number_by_hand(finished: tuple[Path, dict[str, Any]], tokens: Path) -> None:
    """The best checkpoint's model, read over four columns one word after the other in full log-probabilities."""
    folder, _ = finished
    pointer = read_json(folder / "checkpoints" / "best.json", "")
    model: Any = load_model(folder / "checkpoints" / pointer["checkpoint"])[0]
    ids = torch.from_numpy(np.asarray(TokenFiles.open(tokens).split("valid"), dtype=np.int64))
    columns = ids[: len(ids) // 4 * 4].reshape(4, -1)
    total, states = 0.0, model.zero_states(4)
    with torch.no_grad():
        for token in range(columns.shape[1] - 1):
            output = model.stream(columns[:, token : token + 1].t(), states)
            states = output.states
            log_probs = model.full_log_probs(output.raw[0]).double()
            total -= float(log_probs[torch.arange(4), columns[:, token + 1]].sum())
    assert pointer["valid_loss"] == pytest.approx(total / (4 * (columns.shape[1] - 1)), rel=1e-6)


def test_evaluation_reads_each_split_in_one_go(finished: tuple[Path, dict[str, Any]], tokens: Path) -> None:
    folder, _ = finished
    config = lstm_config(tokens, folder, "train.save_every=40", "train.keep_last=99")
    with open_stage("train", config) as stage:
        assert not evaluated_as_trained(config, stage.run)
        summary = run_evaluate(stage)
        assert evaluated_as_trained(config, stage.run)
    results = read_json(folder / "lm.json", "")
    files = TokenFiles.open(tokens)
    model: Any = load_model(folder / "checkpoints" / read_json(folder / "checkpoints" / "best.json", "")["checkpoint"])[
        0
    ]
    for split in ("valid", "test"):
        ids = np.asarray(files.split(split), dtype=np.int64)
        words = torch.from_numpy(np.concatenate([[2], ids]))
        with torch.no_grad():
            hidden = model(words[None, :-1]).hidden[0]
            loss = -float(model.full_log_probs(hidden).double()[torch.arange(len(ids)), words[1:]].mean())
        assert results["splits"][split]["tokens"] == len(ids)
        assert summary[split] == pytest.approx(math.exp(loss), rel=1e-5)


def test_training_learns_and_a_finished_run_does_nothing(finished: tuple[Path, dict[str, Any]], tokens: Path) -> None:
    folder, summary = finished
    assert min(curve(folder, "valid/loss").values()) < math.log(64) - 0.6
    again = run(tokens, folder, "train.save_every=40", "train.keep_last=99")
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}


def test_resume_in_the_middle_of_every_phase_is_bit_exact(
    finished: tuple[Path, dict[str, Any]], tokens: Path, tmp_path: Path
) -> None:
    """Stopped every 61 updates, in and between epochs of all three phases."""
    folder, summary = finished
    extra = ["train.save_every=0", "train.max_updates_this_run=61"]
    for _ in range(math.ceil(summary["step"] / 61) - 1):
        with pytest.raises(Stopped, match="run the same command again"):
            run(tokens, tmp_path / "run", *extra)
    run(tokens, tmp_path / "run", *extra)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (newest(folder) / name).read_bytes() == (newest(tmp_path / "run") / name).read_bytes()
    for name in ("train/loss", "valid/loss", "train/data_fingerprint", "trigger/fired"):
        assert curve(folder, name) == curve(tmp_path / "run", name), name
    assert (
        (read_json(newest(folder) / "state.json", "")["log"])
        == read_json(newest(tmp_path / "run") / "state.json", "")["log"]
    )


def test_the_cut_of_the_columns_may_change_in_the_middle(
    finished: tuple[Path, dict[str, Any]], tokens: Path, tmp_path: Path
) -> None:
    """As the advice has it, for other ranks and for a device whose memory does not do."""
    folder, _ = finished
    with pytest.raises(Stopped):
        run(tokens, tmp_path / "run", "train.max_updates_this_run=61")
    run(tokens, tmp_path / "run", "awd.micro_batch=2")
    wanted, found = (curve(path, "valid/loss") for path in (folder, tmp_path / "run"))
    assert found == pytest.approx(wanted, rel=1e-3)


def test_out_of_memory_names_the_columns_that_there_are(tokens: Path, tmp_path: Path) -> None:
    for extra, said in (((), "below 8 ("), (("awd.micro_batch=4",), "below 4 (")):
        with open_stage("train", lstm_config(tokens, tmp_path, *extra)) as stage:
            assert LstmJob.open(stage).needs_less() == f"Set awd.micro_batch {said}rows of one forward pass)"
    with open_stage("train", lstm_config(tokens, tmp_path, "awd.micro_batch=1")) as stage:
        assert "awd." not in LstmJob.open(stage).needs_less()


def test_fine_tuning_does_not_start_from_weights_that_have_changed(tokens: Path, tmp_path: Path) -> None:
    extra = "awd.epochs=2", "train.max_updates_this_run=80"
    with pytest.raises(Stopped):
        run(tokens, tmp_path / "run", *extra)
    best = tmp_path / "run/checkpoints" / read_json(tmp_path / "run/checkpoints/best.json", "")["checkpoint"]
    assert best != newest(tmp_path / "run")
    path = best / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DistlmError, match=r"model.safetensors: damaged .*fine-tuning starts from this checkpoint"):
        run(tokens, tmp_path / "run", *extra)
    content[-1] ^= 1
    path.write_bytes(content)
    assert run(tokens, tmp_path / "run", "awd.epochs=2")["phase"] == "finetune"


def test_the_trigger_looks_every_log_interval(tokens: Path, tmp_path: Path) -> None:
    """Validations within an epoch change nothing but the trigger; stopped at one, the run goes on in the same bytes."""
    extra = ["awd.epochs=3", "awd.finetune_epochs=0", "awd.log_interval=10"]
    run(tokens, tmp_path / "plain", *extra, "awd.on_trigger=nothing", "awd.log_interval=0")
    run(tokens, tmp_path / "looked", *extra, "awd.on_trigger=nothing")
    assert curve(tmp_path / "plain", "train/loss") == curve(tmp_path / "looked", "train/loss")
    assert len(curve(tmp_path / "plain", "valid/loss")) == 3 < len(curve(tmp_path / "looked", "valid/loss"))
    run(tokens, tmp_path / "whole", *extra)
    averaging = [step for step, fired in curve(tmp_path / "whole", "trigger/fired").items() if fired]
    ends = curve(tmp_path / "plain", "valid/loss")
    assert averaging and averaging[0] not in ends
    with pytest.raises(Stopped):
        run(tokens, tmp_path / "stopped", *extra, f"train.max_updates_this_run={averaging[0]}")
    run(tokens, tmp_path / "stopped", *extra)
    assert same_end(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("how", ["halve", "nothing"])
def test_without_averaging(tokens: Path, tmp_path: Path, how: str) -> None:
    run(tokens, tmp_path / "run", f"awd.on_trigger={how}", "awd.variable_length=false", "awd.batch=40")
    lines = epochs(tmp_path / "run")
    assert {line["train/phase"] for line in lines} == {"sgd"} and len(lines) == 5, "no fine-tuning either"
    rates = sorted(set(curve(tmp_path / "run", "train/lr").values()), reverse=True)
    fired = sum(line["trigger/fired"] for line in lines[:-1])
    assert rates == [20 / 2**number for number in range((fired if how == "halve" else 0) + 1)]


def test_fine_tuning_stops_by_itself(tokens: Path, tmp_path: Path) -> None:
    extra = ["awd.epochs=3", "awd.finetune_epochs=40", "train.lr=40", "awd.batch=40"]
    summary = run(tokens, tmp_path / "run", *extra)
    assert summary["epoch"] < 43 and epochs(tmp_path / "run")[-1]["trigger/fired"]
    assert run(tokens, tmp_path / "run", *extra)["step"] == summary["step"]


BAD = [
    (["awd.batch=3000"], "awd.batch=3000 columns of the train split"),
    (["awd.bptt=700"], "awd.bptt=700 is longer than the corpus"),
    (["awd.valid_batch=400"], "awd.valid_batch=400 columns of the valid split"),
    (["train.deepspeed=zero3"], "ZeRO stage 3 shards the weights.* set train.deepspeed=zero0"),
    (["train.tap=last_ffn_input"], "train.tap='last_ffn_input': no such hidden state; choose one of last_output"),
]


@pytest.mark.parametrize(("overrides", "said"), BAD)
def test_bad_settings_are_refused_before_training(
    tokens: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(DistlmError, match=said):
        run(tokens, tmp_path / "run", *overrides)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


WRONG = [
    (["train.valid_every=0"], "train.valid_every=0: awd.on_trigger=average is triggered by validation losses"),
    (["train.precision=bf16"], "train.precision='bf16': model.kind=awd_lstm needs fp32"),
    (["train.optimizer=adam"], "train.optimizer='adam': expected one of nt_asgd"),
    (["awd.batch=8", "awd.micro_batch=3"], "awd.batch=8: must be a multiple of awd.micro_batch=3"),
    (["lstm.weight_dropout=1"], r"lstm.weight_dropout=1.0: must be in \[0, 1\)"),
]


@pytest.mark.parametrize(("overrides", "said"), WRONG)
def test_wrong_settings_are_refused_at_loading(tokens: Path, tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        lstm_config(tokens, tmp_path, *overrides)


def test_columns_over_ranks() -> None:
    assert plan_columns(AwdConfig(batch=80), 4).blocks_of(3) == slice(60, 80)
    assert plan_columns(AwdConfig(batch=80, micro_batch=5), 4).accumulation == 4
    with pytest.raises(DistlmError, match=r"awd.batch=3 is smaller than the 4 ranks; start 3 ranks or fewer"):
        plan_columns(AwdConfig(batch=3), 4)
    with pytest.raises(DistlmError, match=r"do not divide over 3 ranks; set awd.batch=81; or start 2 ranks"):
        plan_columns(AwdConfig(batch=80), 3)


def test_another_model_under_a_checkpoint_is_refused(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tokens, tmp_path / "run", "train.max_updates_this_run=3")
    with pytest.raises(DistlmError, match=r"other settings \(lstm.width: 12 there, 10 now\)"):
        run(tokens, tmp_path / "run", "lstm.width=10")
    # The checkpoint knows it too, where the record of the settings is gone.
    (tmp_path / "run" / "configs" / "train.yaml").unlink()
    with pytest.raises(DistlmError, match=r"lstm.width differs: 12 there, 10 now"):
        run(tokens, tmp_path / "run", "lstm.width=10")


def test_plan_of_the_recipes() -> None:
    plan = plan_train(load_config("awd-lstm-wikitext2", ["run_dir=/nonexistent/distlm"]), 1)
    assert "33.6 M parameters" in plan.work and "80 columns x about 70 tokens" in plan.work
    assert any("no token files yet" in note for note in plan.notes)
