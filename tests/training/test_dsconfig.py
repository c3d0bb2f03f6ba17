"""DeepSpeed's JSON: every shipped file is accepted, every fault names the file, the key and the mend."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from distlm.config.schema import TrainConfig
from distlm.errors import DistlmError
from distlm.training.dsconfig import (
    MONITORS,
    OWNED,
    config_folders,
    described,
    load_ds_config,
    merge_ds_config,
    offloaded,
    zero_stage,
)

SHIPPED = sorted(config_folders()[0].glob("*.json"))


def written(folder: Path, content: Any) -> str:
    path = folder / "own.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return str(path)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_file_is_accepted(path: Path, precision: str) -> None:
    train = TrainConfig(precision=precision, clip_norm=0.1)  # type: ignore[arg-type]
    if (path.stem, precision) == ("zero0", "fp16"):
        with pytest.raises(DistlmError, match=r"does not scale the loss at ZeRO stage 0.*set train.deepspeed=zero1"):
            merge_ds_config(dataclasses.replace(train, deepspeed=path.stem), 2, accumulation=3)
        return
    merged = merge_ds_config(dataclasses.replace(train, deepspeed=path.stem), 2, accumulation=3)
    assert zero_stage(merged) == int(path.stem[4])
    assert merged["train_micro_batch_size_per_gpu"] == 2
    assert merged["gradient_accumulation_steps"] == 3
    assert merged["gradient_clipping"] == 0.1
    assert {key for key in ("fp16", "bf16") if key in merged} == {precision} - {"fp32"}
    assert "comment" not in merged


def test_the_four_stages_are_shipped_and_three_with_offload() -> None:
    names = sorted(path.stem for path in SHIPPED)
    assert names == ["zero0", "zero1", "zero1-offload", "zero2", "zero2-offload", "zero3", "zero3-offload"]
    for name in names:
        away = offloaded(load_ds_config(name))
        assert (away.optimizer, away.weights) == ("offload" in name, name == "zero3-offload")
        assert ("host's memory" in described(load_ds_config(name))) == ("offload" in name)


def test_name_is_also_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "mine.json").write_text('{"zero_optimization": {"stage": 2}}', "utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_ds_config("mine") == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("name", ["zeroo1", "nothing-like-it", "folder/none.json"])
def test_missing_file_is_named(name: str) -> None:
    with pytest.raises(DistlmError, match=f"train.deepspeed={name}: no such"):
        load_ds_config(name)
    if name == "zeroo1":
        with pytest.raises(DistlmError, match="did you mean 'zero1'"):
            load_ds_config(name)


@pytest.mark.parametrize(("key", "setting"), OWNED.items())
def test_key_that_train_decides_is_refused(tmp_path: Path, key: str, setting: str) -> None:
    with pytest.raises(DistlmError) as caught:
        load_ds_config(written(tmp_path, {key: 1}))
    assert f"{key} is decided by {setting}" in str(caught.value)


@pytest.mark.parametrize(("key", "instead"), MONITORS.items())
def test_deepspeed_s_own_trackers_are_refused(tmp_path: Path, key: str, instead: str) -> None:
    with pytest.raises(DistlmError) as caught:
        load_ds_config(written(tmp_path, {key: {"enabled": True}}))
    assert f"{instead} and delete {key} here" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimisation": {}}, "unknown key zero_optimisation; did you mean 'zero_optimization'"),
        ({"train_batch_sise": 3}, "unknown key train_batch_sise; did you mean 'train_batch_size'"),
        ({"zero_optimization": {"stages": 1}}, "unknown key zero_optimization.stages; did you mean 'stage'"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4: must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": -1}}, "must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "1"}}, "zero_optimization.stage='1': expected number"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage=True: expected number"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "reduce_bucket_size='auto': expected number"),
        ({"zero_optimization": 1}, "zero_optimization=1: expected object"),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown=1: expected true or false"),
        ({"communication_data_type": "int8"}, "communication_data_type='int8': must be one of fp32, fp16, bf16"),
        ({"data_types": {"grad_accum_dtype": "fp64"}}, "data_types.grad_accum_dtype='fp64'"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.device='nvme': must be cpu or none",
        ),
        ({"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer needs stage 1"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "offload_optimizer.ratio=0.5 works with DeepSpeed's CPUAdam alone",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "offload_optimizer.super_offload=True works with DeepSpeed's CPUAdam alone",
        ),
        ("{", "not valid JSON"),
        ("[1]", "expected an object with keys, found list"),
    ],
)
def test_fault_names_file_key_and_mend(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(DistlmError) as caught:
        load_ds_config(written(tmp_path, content))
    assert said in str(caught.value)
    assert "own.json" in str(caught.value)


def test_stage_0_cannot_accumulate_in_another_precision(tmp_path: Path) -> None:
    name = written(tmp_path, {"data_types": {"grad_accum_dtype": "fp32"}})
    with pytest.raises(DistlmError, match=r"needs ZeRO stage 1 to 3; set train.deepspeed=zero1"):
        merge_ds_config(TrainConfig(deepspeed=name, precision="bf16"), 1, 1)
    merge_ds_config(TrainConfig(deepspeed=name, precision="fp32"), 1, 1)
