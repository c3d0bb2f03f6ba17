"""DeepSpeed's JSON: found by name, checked before DeepSpeed sees it, merged with what TrainConfig decides.

A file holds how the work is sharded and communicated. What decides the result (batch, optimizer, schedule, precision,
clipping) belongs to `train.*`, and a file that sets it is refused, so that there is one place for each setting.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlm.config.schema import TrainConfig
from distlm.errors import DistlmError, UsageError
from distlm.installed import tree
from distlm.runtime.files import json_of

OWNED = {
    "train_batch_size": "train.blocks_per_update",
    "train_micro_batch_size_per_gpu": "train.micro_blocks",
    "gradient_accumulation_steps": "train.blocks_per_update and train.micro_blocks",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "fp16": "train.precision=fp16",
    "bf16": "train.precision=bf16",
    "bfloat16": "train.precision=bf16",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "steps_per_print": "train.log_every",
    "checkpoint": "train.save_every and train.keep_last",
    "seed": "train.seed",
}
"""Keys of DeepSpeed that TrainConfig decides, and the setting that does."""

MONITORS = {
    "tensorboard": "set train.trackers=[tensorboard]",
    "wandb": "set train.trackers=[wandb]",
    "comet": "set train.trackers=[tensorboard] or [wandb]",
    "csv_monitor": "`distlm metrics RUN_DIR --csv` prints all metrics of a run",
}
"""DeepSpeed's own trackers, and what stands in for each."""

PASSED: dict[str, tuple[type, ...]] = {
    "comment": (str,),
    "zero_optimization": (dict,),
    "zero_allow_untested_optimizer": (bool,),
    "zero_force_ds_cpu_optimizer": (bool,),
    "communication_data_type": (str,),
    "prescale_gradients": (bool,),
    "gradient_predivide_factor": (int, float),
    "data_types": (dict,),
    "aio": (dict,),
    "comms_logger": (dict,),
    "flops_profiler": (dict,),
    "timers": (dict,),
    "wall_clock_breakdown": (bool,),
    "memory_breakdown": (bool,),
    "dump_state": (bool,),
}
"""Keys that are handed on, with their JSON types. `comment` is for people and is dropped."""

ZERO: dict[str, tuple[type, ...]] = {
    "stage": (int,),
    "contiguous_gradients": (bool,),
    "reduce_scatter": (bool,),
    "reduce_bucket_size": (int, float),
    "use_multi_rank_bucket_allreduce": (bool,),
    "allgather_partitions": (bool,),
    "allgather_bucket_size": (int, float),
    "overlap_comm": (bool,),
    "round_robin_gradients": (bool,),
    "ignore_unused_parameters": (bool,),
    "offload_optimizer": (dict,),
    "offload_param": (dict,),
    "sub_group_size": (int, float),
    "stage3_prefetch_bucket_size": (int, float),
    "stage3_param_persistence_threshold": (int, float),
    "stage3_model_persistence_threshold": (int, float),
    "stage3_max_live_parameters": (int, float),
    "stage3_max_reuse_distance": (int, float),
    "stage3_module_granularity_threshold": (int, float),
    "stage3_use_all_reduce_for_fetch_params": (bool,),
    "memory_efficient_linear": (bool,),
}
"""Keys of the section zero_optimization that are handed on."""

_DTYPES = ("fp32", "fp16", "bf16")


def config_folders() -> list[Path]:
    """Where a name is looked for, in order: the shipped folder, the working folder."""
    return [tree() / "ds_configs", Path.cwd() / "ds_configs"]


def find_ds_config(name: str) -> Path:
    """File of `train.deepspeed`: a path that ends in .json, or a name in ds_configs/. DistlmError if there is none."""
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"train.deepspeed={name}: no such file")
        return path
    known: dict[str, Path] = {}
    for folder in config_folders():
        for path in sorted(folder.glob("*.json")):
            known.setdefault(path.stem, path)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(
        f"train.deepspeed={name}: no such DeepSpeed configuration{hint}; "
        f"known: {', '.join(sorted(known)) or 'none'}; or give the path of a .json file"
    )


DeepSpeedConfig = dict[str, Any]
"""DeepSpeed's own configuration, as in its JSON files."""


def load_ds_config(name: str) -> DeepSpeedConfig:
    """The checked content of `train.deepspeed`, without comments.

    Raises DistlmError for a missing file, broken JSON, an unknown key (with the nearest name), a key that `train.*`
    owns (with that setting), a value of the wrong type, or a ZeRO stage outside 0..3.
    """
    path = find_ds_config(name)
    try:
        config = json_of(path.read_text("utf-8"))
    except ValueError as error:
        raise DistlmError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise DistlmError(f"{path}: expected an object with keys, found {type(config).__name__}")
    for key in config:
        if key in MONITORS:
            raise DistlmError(
                f"{path}: {key} would log the learning rate and little else; {MONITORS[key]} and delete {key} here"
            )
        if key in OWNED:
            raise DistlmError(f"{path}: {key} is decided by {OWNED[key]}; set that and delete {key} here")
    _check(path, config, PASSED, "")
    _check(path, config.get("zero_optimization", {}), ZERO, "zero_optimization.")
    _check_meaning(path, config)
    return {key: value for key, value in config.items() if key != "comment"}


def zero_stage(config: Mapping[str, Any]) -> int:
    """ZeRO stage, 0 to 3, of a loaded configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


@dataclass(frozen=True)
class Offloaded:
    """What a configuration keeps in the host's memory instead of the device's."""

    optimizer: bool
    """Optimizer states and fp32 master weights; the optimizer steps on the processor."""
    weights: bool
    """The weights that the model computes with (ZeRO 3)."""


def offloaded(config: Mapping[str, Any]) -> Offloaded:
    """What a loaded configuration keeps in the host's memory."""
    zero = config.get("zero_optimization", {})
    places = [zero.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")]
    return Offloaded(*(place != "none" for place in places))


def described(config: Mapping[str, Any]) -> str:
    """The ZeRO stage of a loaded configuration, and what it offloads, for people."""
    away = offloaded(config)
    what = ["optimizer"] * away.optimizer + ["weights"] * away.weights
    return f"ZeRO {zero_stage(config)}" + (f" ({' and '.join(what)} in the host's memory)" if what else "")


def merge_ds_config(train: TrainConfig, micro_blocks: int, accumulation: int) -> DeepSpeedConfig:
    """What deepspeed.initialize gets: the file of `train.deepspeed` plus what `train` and the micro-batch plan decide.

    `micro_blocks`: blocks in one forward pass, for DeepSpeed's own accounts; `accumulation`: micro-batches of one rank
    in one update. Raises UsageError for combinations that DeepSpeed cannot do, naming the one to use.
    """
    name = train.deepspeed
    config = load_ds_config(name)
    stage = zero_stage(config)
    if stage == 0 and train.precision == "fp16":
        # DeepSpeed 0.19.8: without ZeRO, engine.backward leaves the loss unscaled and step divides by the scale.
        raise UsageError(
            f"train.deepspeed={name} with train.precision=fp16: DeepSpeed does not scale the loss at ZeRO stage 0, "
            "so gradients would vanish; set train.deepspeed=zero1"
        )
    if stage == 0:
        gradients = config.get("data_types", {}).get("grad_accum_dtype", train.precision)
        if gradients != train.precision:
            raise UsageError(
                f"train.deepspeed={name}: data_types.grad_accum_dtype={gradients} with "
                f"train.precision={train.precision} needs ZeRO stage 1 to 3; set train.deepspeed=zero1"
            )
    merged = {
        **config,
        "train_micro_batch_size_per_gpu": micro_blocks,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if train.precision == "fp16":
        # The loss is a mean over tokens. As in fairseq (tolerance 0) one overflow lowers the scale.
        merged["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 1}
    elif train.precision == "bf16":
        merged["bf16"] = {"enabled": True}
        if stage > 0 and "data_types" not in config:
            # 8 bits of mantissa are too few to sum micro-batches in.
            merged["data_types"] = {"grad_accum_dtype": "fp32"}
    return merged


def _check(path: Path, values: Mapping[str, Any], known: Mapping[str, tuple[type, ...]], prefix: str) -> None:
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *([] if prefix else OWNED)], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise DistlmError(f"{path}: unknown key {prefix}{key}{hint}")
        types = known[key]
        if isinstance(value, bool) != (types == (bool,)) or not isinstance(value, types):
            names = {"dict": "object", "str": "string", "bool": "true or false", "int": "number", "float": "number"}
            raise DistlmError(f"{path}: {prefix}{key}={value!r}: expected {names[types[0].__name__]}")


def _check_meaning(path: Path, config: Mapping[str, Any]) -> None:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in range(4):
        raise DistlmError(f"{path}: zero_optimization.stage={stage}: must be 0, 1, 2 or 3")
    for key, value in (
        ("communication_data_type", config.get("communication_data_type", "fp32")),
        ("data_types.grad_accum_dtype", config.get("data_types", {}).get("grad_accum_dtype", "fp32")),
    ):
        if value not in _DTYPES:
            raise DistlmError(f"{path}: {key}={value!r}: must be one of {', '.join(_DTYPES)}")
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        section = config.get("zero_optimization", {}).get(key)
        if section is None:
            continue
        if section.get("device", "none") not in ("cpu", "none"):
            raise DistlmError(
                f"{path}: zero_optimization.{key}.device={section['device']!r}: must be cpu or none "
                "(checkpoints here do not reach states on NVMe)"
            )
        for part, plain in (("ratio", 1), ("super_offload", False)):
            if section.get(part, plain) != plain:
                raise DistlmError(
                    f"{path}: zero_optimization.{key}.{part}={section[part]!r} works with DeepSpeed's CPUAdam "
                    "alone, which is not used here (it would have to be compiled); delete it"
                )
        if stage < least:
            raise DistlmError(f"{path}: zero_optimization.{key} needs stage {least} or more, the file has {stage}")
