"""What writing the datastore will need: disk, memory, time."""

from distlm.config.schema import RunConfig
from distlm.data.estimate import expected_tokens
from distlm.datastore.lengths import block_lengths
from distlm.datastore.plan import plan_store
from distlm.datastore.shard_writer import QUEUE_BATCHES
from distlm.errors import DistlmError, UsageError
from distlm.models.card import model_of_card, read_model_card
from distlm.models.described import causal, causal_kind, model_bytes, model_of
from distlm.runtime.plan import StagePlan, rank_flops
from distlm.runtime.ranks.cores import share_of_cores
from distlm.runtime.rundir import RunDir
from distlm.runtime.units.planned import idle_note, speedup

MORE_UNITS = "a smaller datastore.batch_blocks or datastore.block makes more units"
_BASE_MEMORY = 400_000_000
"""Python with torch."""


def plan_datastore(config: RunConfig, ranks: int) -> StagePlan:
    """Needs of the stage at a rank count, from the counts in the token files' meta.json where there are any.

    Raises DistlmError for blocks that do not fit the model or leave nothing to store.
    """
    store, run = config.datastore, RunDir.of(config)
    notes: list[str] = []
    try:
        described = model_of_card(read_model_card(run.model_checkpoint(config)))
    except DistlmError:
        described = model_of(config)
    model = causal(described)
    found = causal_kind(model)
    found.require_tap(model, store.tap, "datastore.tap")
    expected = expected_tokens(config)
    tokens, vocabulary = expected.tokens.get(store.split, 0), expected.words or found.assumed_words(config)
    if expected.exact and store.split not in expected.tokens:
        raise UsageError(
            f"datastore.split={store.split!r}: the token files have {', '.join(expected.tokens)}; choose one of these"
        )
    notes += expected.note
    if not expected.words and tokens:
        notes.append(f"a dictionary of {vocabulary} words is assumed")
    if tokens == 0:
        return StagePlan("datastore write", "rows unknown", 0, 0, None, notes, known=False)
    window, block = block_lengths(store.context_window, store.block, model.max_positions)
    plan = plan_store(tokens, window, block, store.batch_blocks, store.rows_per_shard, model.max_positions)
    item = store.key_item
    length = window + block
    batch = store.batch_blocks * length
    # Residual, normed, q, k, v and attention output, and the widest layer, in fp32.
    threads = config.launch.threads or share_of_cores(ranks)
    activations = threads * 4 * batch * (8 * model.width + found.inner_floats(model))
    queue = (QUEUE_BATCHES + 1) * store.batch_blocks * block * model.width * item
    computed = int(plan.blocks.lengths.sum())
    notes += idle_note(plan.unit_count, ranks, MORE_UNITS)
    notes.append("time at this process's CPU rate for each rank; on a GPU it is an upper bound")
    rate = rank_flops(config.launch.threads, ranks) * speedup([plan.unit_count], ranks)
    seconds = computed * found.forward_flops(model, store.tap, length) / rate
    return StagePlan(
        "datastore write",
        f"{plan.rows} rows x {model.width} {store.key_dtype} in {len(plan.shards)} shards, {plan.unit_count} units of "
        f"work; context {window} + block {block}: {computed / plan.rows:.2f} tokens computed per row",
        disk_bytes=plan.rows * (model.width * item + 4),
        memory_bytes=_BASE_MEMORY + model_bytes(model, vocabulary) + activations + queue,
        seconds=seconds,
        notes=notes,
        units=(plan.unit_count,),
    )
