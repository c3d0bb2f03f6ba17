"""What the neural cache will need: disk, memory, time."""

from distlm.config.schema import RunConfig
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.knnlm.cache.files import cache_bytes, check_windows
from distlm.knnlm.cache.scores import block_bytes
from distlm.knnlm.plan import READ_FIRST, reading_seconds
from distlm.knnlm.search.states import StatesWork
from distlm.models.card import model_fingerprint
from distlm.models.described import causal, causal_kind, model_bytes, model_of, require_tap
from distlm.runtime.plan import StagePlan, rank_flops
from distlm.runtime.ranks.cores import share_of_cores
from distlm.runtime.rundir import RunDir

_BASE_MEMORY = 450_000_000
"""Python with torch and faiss."""
_CELL_S, _THETA_S = 1.0e-8, 2.5e-9
"""Seconds of one core for one of the Q × window products, without the product itself: mask and maximum, and the
exponential of each θ; from benchmarks/cache.py."""


def plan_cache(config: RunConfig, ranks: int) -> StagePlan:
    """Needs of the neural cache of all splits, with the forward passes where no search has kept the hidden states.

    Raises DistlmError when a window is longer than a split.
    """
    knn, cache, run = config.knn, config.cache, RunDir.of(config)
    model, widest, cells = causal(model_of(config)), max(cache.windows), len(cache.windows) * len(cache.thetas)
    tap = cache.tap or config.datastore.tap
    work = f"{len(cache.windows)} windows up to {widest} x {len(cache.thetas)} θ of tap {tap}"
    require_tap(model, tap, "cache.tap" if cache.tap else "datastore.tap")
    try:
        tokens = TokenFiles.open(run.tokens(config))
    except DistlmError:
        note = "no token files yet: disk and time are known once they are there"
        return StagePlan("knn cache", work, 0, 0, None, [note], known=False)
    counts = {split: len(tokens.split(split)) for split in knn.splits}
    for split, count in counts.items():
        check_windows(cache, split, count)
    queries, forward = sum(counts.values()), sum(counts[split] for split in _missing(config, run, tokens))
    width, item = model.width, config.datastore.key_item
    threads = config.launch.threads or share_of_cores(ranks)
    flops = rank_flops(config.launch.threads, ranks)
    seconds = queries * widest * (2 * width / flops + (_CELL_S + _THETA_S * len(cache.thetas)) / threads)
    unit = min(queries, knn.blocks_per_unit * knn.block)
    memory = _BASE_MEMORY + (unit + widest) * width * (4 + item) + threads * block_bytes(widest) + 20 * unit * cells
    notes = [f"of the memory {threads * block_bytes(widest) / 1e6:.0f} MB are blocks of products, one per thread"]
    reading = 0.0
    if forward:
        length = knn.context_window + knn.block
        per_token = causal_kind(model).forward_flops(model, "output", length)
        seconds += forward * (length / knn.block) * per_token / flops
        memory += model_bytes(model, len(tokens.dictionary)) + threads * 48 * knn.batch_blocks * length * width
        reading = reading_seconds(config, model, forward)
        if reading:
            notes.append(READ_FIRST)
        notes.append(f"no search has kept the hidden states of {forward} tokens: they are computed first")
    return StagePlan(
        "knn cache",
        f"{queries} tokens ({', '.join(knn.splits)}), {work}",
        disk_bytes=cache_bytes(cache, queries) + forward * (width * item + 12),
        memory_bytes=memory,
        seconds=seconds / max(ranks, 1) + reading,
        notes=notes,
    )


def _missing(config: RunConfig, run: RunDir, tokens: TokenFiles) -> list[str]:
    """Splits whose hidden states no stage has kept yet."""
    try:
        model = model_fingerprint(run.model_checkpoint(config))
        works = [StatesWork(config, run, tokens, model, split) for split in config.knn.splits]
        return [work.split for work in works if work.kept() is None]
    except DistlmError:
        return list(config.knn.splits)
