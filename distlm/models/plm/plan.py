"""What training and evaluating a masked language model will need."""

from distlm.data.shards.reader import ShardRows
from distlm.errors import DistlmError
from distlm.memory.of_model import layers_and_values
from distlm.memory.plan import Work, chosen_plan, planes
from distlm.models.described import largest_parameter, model_of, parameter_count
from distlm.models.plm.config import PlmRun
from distlm.models.plm.description import PlmModel
from distlm.models.plm.sizes import BackboneSizes, backbone_sizes
from distlm.models.plm.text.pieces import plan_rows
from distlm.models.plm.text.short_rows import short_rows
from distlm.runtime.plan import StagePlan, rank_flops
from distlm.runtime.rundir import RunDir
from distlm.training.dsconfig import described, load_ds_config
from distlm.training.memory_need import states_memory, training_peak


def plan_plm(config: PlmRun, ranks: int) -> StagePlan:
    """Needs of training at a rank count.

    Time counts 6 FLOP per weight and token, and for the memory 6 for each of its query weights and half keys and for
    each value read, H·k·D a token; the softmax is that of the predicted tokens. The rate is this machine's CPU.
    Raises DistlmError for a micro-batch that does not divide over the ranks, short rows that do not divide a row, and a
    bad train.deepspeed.
    """
    train, memory = config.train, config.memory
    model = plm_of(config)
    plm = backbone_sizes(model.backbone)
    micro, deepspeed = plan_rows(train, ranks), load_ds_config(train.deepspeed)
    vocabulary, row_tokens, notes = _rows_of(config, "train")
    parameters = parameter_count(model, vocabulary)
    layers, values = layers_and_values(model.memory, plm.width)
    tokens = train.updates * train.blocks_per_update * row_tokens
    states = 2 if train.optimizer == "adam" else 1
    checkpoint = 4 * (parameters * (1 + states) + planes(memory) * values)
    body = parameters - vocabulary * plm.width
    head = config.plm.mask_share * vocabulary * plm.width
    read = layers * memory.heads * memory.k * plm.width
    flops = tokens * 6.0 * (body + head + read + row_tokens * plm.width * plm.layers)
    seconds = flops / (rank_flops(config.launch.threads, ranks) * ranks)
    piece = micro.micro_blocks * row_tokens
    kept = states_memory(parameters, largest_parameter(model, vocabulary), states, train.precision, deepspeed, ranks)
    held = 0
    if layers:
        half = train.precision != "fp32"
        work = Work(ranks, piece, micro.accumulation, layers, 2 if half else 4)
        held, note = chosen_plan(memory, plm.width, work)
        notes.append(note)
    peak = training_peak(kept, held, activation_bytes(plm, piece, row_tokens))
    cuts = short_rows(config.plm, config.train, row_tokens)
    if cuts:
        shorter = ", then ".join(f"{updates} updates in pieces of {tokens}" for tokens, updates in cuts)
        notes.append(f"rows are short first: {shorter} tokens")
    if train.precision == "fp16":
        notes.append("fp16 with loss scaling: the way on V100, which has no bf16")
    return StagePlan(
        "train",
        f"{train.updates} updates of {train.blocks_per_update} rows x {row_tokens} tokens ({tokens / 1e6:.1f} M), "
        f"{parameters / 1e6:.1f} M parameters, {micro.accumulation} micro-batches of {train.micro_blocks} rows, "
        f"{described(deepspeed)}",
        checkpoint * (train.keep_last + 2),
        peak.memory,
        seconds,
        notes,
        device_bytes=peak.device,
        host_bytes=peak.host,
    )


def activation_bytes(plm: BackboneSizes, tokens: int, row_tokens: int) -> int:
    """Bytes of the activations of `tokens` tokens, in rows of `row_tokens`."""
    # With dropout the attention weights are kept.
    attention = 3 * plm.layers * plm.heads * row_tokens if plm.attention_dropout else 0
    return 4 * tokens * (plm.layers * (12 * plm.width + 3 * plm.ffn_width) + attention)


def plan_evaluate_plm(config: PlmRun, ranks: int) -> StagePlan:
    """Needs of `distlm evaluate`: 2 FLOP per weight and token; every rank has the whole model."""
    vocabulary, row_tokens, notes = _rows_of(config, "valid")
    model = plm_of(config)
    parameters = parameter_count(model, vocabulary)
    _, values = layers_and_values(model.memory, backbone_sizes(model.backbone).width)
    rows = 0
    for split in ("valid", "test"):
        try:
            rows += len(ShardRows.open(RunDir.of(config).shards(config), split))
        except DistlmError:
            continue
    tokens = rows * row_tokens
    seconds = 2.0 * parameters * tokens / (rank_flops(config.launch.threads, ranks) * ranks) if tokens else None
    return StagePlan("evaluate", f"{tokens or 'unknown'} tokens", 0, 4 * (parameters + values), seconds, notes)


def plm_of(config: PlmRun) -> PlmModel:
    """The masked language model of a configuration. Raises DistlmError when plm.checkpoint cannot be read."""
    model = model_of(config)
    assert isinstance(model, PlmModel)
    return model


def _rows_of(config: PlmRun, split: str) -> tuple[int, int, list[str]]:
    """Vocabulary, tokens of a row, and what is assumed where there are no shards yet."""
    try:
        rows = ShardRows.open(RunDir.of(config).shards(config), split)
    except DistlmError:
        size = config.shards.vocabulary_size
        return size, config.shards.row_tokens, [f"no shards yet: a vocabulary of {size} is assumed"]
    return rows.vocabulary, rows.row_tokens, []
