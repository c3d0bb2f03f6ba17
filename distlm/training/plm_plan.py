"""What training and evaluating a masked language model will need."""

from pathlib import Path

from distlm.config.schema import RunConfig
from distlm.data.shard_reader import ShardRows
from distlm.errors import DistlmError
from distlm.memory.layer import memory_size
from distlm.models.kinds import model_config, parameter_count
from distlm.runtime.plan import StagePlan, machine_flops
from distlm.runtime.rundir import RunDir
from distlm.training.dsconfig import load_ds_config, zero_stage
from distlm.training.memory_need import states_bytes
from distlm.training.plm_rows import plan_rows


def plan_plm(config: RunConfig, ranks: int) -> StagePlan:
    """Needs of training at a rank count.

    Time counts 6 FLOP per weight and token, and for the memory 6 for each of its query weights and half keys and for
    each value read, H·k·D a token; the softmax is that of the predicted tokens. The rate is this machine's CPU.
    Raises DistlmError for a micro-batch that does not divide over the ranks and for a bad train.deepspeed.
    """
    train, plm, memory = config.train, config.plm, config.memory
    micro, stage = plan_rows(train, ranks), zero_stage(load_ds_config(train.deepspeed))
    vocabulary, row_tokens, notes = _rows_of(config, "train")
    parameters = parameter_count(model_config(config), vocabulary)
    layers = len(memory.positions) if memory.kind != "none" else 0
    values = layers * memory_size(memory, plm.width).values
    columns = memory.columns or ranks
    tokens = train.updates * train.blocks_per_update * row_tokens
    states = 2 if train.optimizer == "adam" else 1
    checkpoint = 4 * parameters * (1 + states) + 12 * values
    body = parameters - vocabulary * plm.width
    head = plm.mask_share * vocabulary * plm.width
    read = layers * memory.heads * memory.k * plm.width
    seconds = tokens * 6.0 * (body + head + read + row_tokens * plm.width * plm.layers) / (machine_flops() * ranks)
    piece = micro.micro_blocks * row_tokens
    attention = 3 * plm.layers * plm.heads * row_tokens if plm.attention_dropout else 0
    activations = 4 * piece * (plm.layers * (12 * plm.width + 3 * plm.ffn_width) + attention)
    if layers:
        notes.append(
            f"{layers} memories of {memory.sub_keys**2} slots: {values / 1e6:.1f} M values, "
            f"{format_share(columns, ranks)}; fp32 values and two moments"
        )
    if train.precision == "fp16":
        notes.append("fp16 with loss scaling: the way on V100, which has no bf16")
    return StagePlan(
        "train",
        f"{train.updates} updates of {train.blocks_per_update} rows x {row_tokens} tokens ({tokens / 1e6:.1f} M), "
        f"{parameters / 1e6:.1f} M parameters, {micro.accumulation} micro-batches of {train.micro_blocks} rows, "
        f"ZeRO {stage}",
        checkpoint * (train.keep_last + 2),
        states_bytes(parameters, states, train.precision != "fp32", stage, ranks)
        + 12 * values // columns
        + activations,
        seconds,
        notes,
    )


def plan_evaluate_plm(config: RunConfig, ranks: int) -> StagePlan:
    """Needs of `distlm evaluate`: 2 FLOP per weight and token; every rank has the whole model."""
    vocabulary, row_tokens, notes = _rows_of(config, "valid")
    parameters = parameter_count(model_config(config), vocabulary)
    layers = len(config.memory.positions) if config.memory.kind != "none" else 0
    values = layers * memory_size(config.memory, config.plm.width).values
    rows = 0
    for split in ("valid", "test"):
        try:
            rows += len(ShardRows.open(RunDir(Path(config.run_dir)).shards(config), split))
        except DistlmError:
            continue
    tokens = rows * row_tokens
    seconds = 2.0 * parameters * tokens / (machine_flops() * ranks) if tokens else None
    return StagePlan("evaluate", f"{tokens or 'unknown'} tokens", 0, 4 * (parameters + values), seconds, notes)


def format_share(columns: int, ranks: int) -> str:
    """How the values lie on the ranks, for people."""
    if columns == 1:
        return "a full copy on every rank"
    return f"columns over {columns} ranks" + (f", {ranks // columns} copies" if columns < ranks else "")


def _rows_of(config: RunConfig, split: str) -> tuple[int, int, list[str]]:
    """Vocabulary, tokens of a row, and what is assumed where there are no shards yet."""
    try:
        rows = ShardRows.open(RunDir(Path(config.run_dir)).shards(config), split)
    except DistlmError:
        size = config.shards.vocabulary_size
        return size, config.shards.row_tokens, [f"no shards yet: a vocabulary of {size} is assumed"]
    return rows.vocabulary, rows.row_tokens, []
