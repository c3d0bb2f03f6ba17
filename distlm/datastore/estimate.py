"""What writing the datastore will need: disk, memory, time."""

from itertools import pairwise
from pathlib import Path

from distlm.config.schema import LstmConfig, RunConfig
from distlm.data.prepare import plan_prepare
from distlm.data.tokens import DTYPE, TokenFiles
from distlm.datastore.plan import plan_store
from distlm.datastore.shard_writer import QUEUE_BATCHES
from distlm.errors import DistlmError
from distlm.models.card import read_model_card
from distlm.models.hf.model import OUTPUT, HfModel
from distlm.models.kinds import (
    CausalConfig,
    card_config,
    causal,
    inner_width,
    model_config,
    parameter_count,
    require_tap,
)
from distlm.runtime.plan import StagePlan, machine_flops
from distlm.runtime.ranks.cores import share_of_cores
from distlm.runtime.rundir import RunDir

_BASE_MEMORY = 400_000_000
"""Python with torch."""


def plan_datastore(config: RunConfig, ranks: int) -> StagePlan:
    """Needs of the stage at a rank count, from the counts in the token files' meta.json where there are any.

    Raises DistlmError for blocks that do not fit the model or leave nothing to store.
    """
    store, run, notes = config.datastore, RunDir(Path(config.run_dir)), []
    try:
        described = card_config(read_model_card(run.model_checkpoint(config)))
    except DistlmError:
        described = model_config(config)
    model = causal(described)
    require_tap(model, store.tap, "datastore.tap")
    try:
        files = TokenFiles.open(run.tokens(config))
        tokens, vocabulary = len(files.split(store.split)), len(files.dictionary)
    except DistlmError:
        tokens = plan_prepare(config).disk_bytes // DTYPE.itemsize
        vocabulary = config.data.max_words or 4 * max(config.model.cutoffs, default=10000)
        notes.append(f"no token files yet: at most about {tokens} tokens and {vocabulary} words are assumed")
    if tokens == 0:
        notes.append("rows, disk and time are known once the token files are there")
        return StagePlan("datastore write", "rows unknown", 0, _BASE_MEMORY, None, notes)
    plan = plan_store(
        tokens, store.context_window, store.block, store.batch_blocks, store.rows_per_shard, model.max_positions
    )
    item = 2 if store.key_dtype == "float16" else 4
    length = store.context_window + store.block
    batch = store.batch_blocks * length
    # Residual, normed, q, k, v and attention output, and one inner layer of the feed-forward, in fp32; or the gates of
    # an LSTM layer with its input and output.
    inner = inner_width(model)
    threads = config.launch.threads or share_of_cores(ranks)
    activations = threads * 4 * batch * (8 * model.width + inner * (6 if isinstance(model, LstmConfig) else 1))
    queue = (QUEUE_BATCHES + 1) * store.batch_blocks * store.block * model.width * item
    computed = int(plan.blocks.lengths.sum())
    if ranks > len(plan.shards):
        notes.append(f"{len(plan.shards)} shards: {ranks - len(plan.shards)} of {ranks} ranks will have nothing to do")
    notes.append("time at this process's CPU rate for each rank; on a GPU it is an upper bound")
    seconds = computed * forward_flops(model, store.tap, length) / (machine_flops() * min(ranks, len(plan.shards)))
    return StagePlan(
        "datastore write",
        f"{plan.rows} rows x {model.width} {store.key_dtype} in {len(plan.shards)} shards; {computed / plan.rows:.2f} "
        "tokens computed per row",
        disk_bytes=plan.rows * (model.width * item + 4),
        memory_bytes=_BASE_MEMORY + 4 * parameter_count(model, vocabulary) + activations + queue,
        seconds=seconds,
        notes=notes,
    )


def forward_flops(model: CausalConfig, tap: str, length: int) -> float:
    """FLOP per token of a forward pass to the tap over sequences of `length` tokens (causal attention: half of it)."""
    if isinstance(model, LstmConfig):
        widths = [model.width, *[model.hidden_width] * (model.layers - 1), model.width]
        return float(sum(2 * 4 * after * (before + after) for before, after in pairwise(widths)))
    if isinstance(model, HfModel):
        # Every weight once, but for the embedding, which is looked up and, where it is tied, no layer's own.
        layers = parameter_count(model, 0) - model.rows * model.width
        return 2.0 * max(layers, 0) + (2.0 * model.rows * model.width if tap == OUTPUT else 0.0)
    attention = 2 * 4 * model.width**2 + 2 * length * model.width
    ffn = 2 * 2 * model.width * model.ffn_width
    last = {"last_attention_residual": 0, "last_attention_input": 0, "output": attention + ffn}
    return (model.layers - 1) * (attention + ffn) + last.get(tap, attention)
