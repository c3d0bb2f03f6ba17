"""`distlm index tune`: what was measured as a table, CSV and plot, and the pick for a budget."""

from collections.abc import Sequence
from pathlib import Path

from msgspec import structs

from distlm.analysis.plots.mixtures import recall_over_time
from distlm.analysis.tables import markdown, write_csv, write_picture, write_text
from distlm.config.schema import RunConfig
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.choose.measure import (
    Budget,
    KnownOf,
    Question,
    Sample,
    draw_sample,
    measure_all,
    pareto,
    pick,
)
from distlm.index.choose.proposals import Proposal, asked_for, code_proposals, list_proposals
from distlm.index.records import Candidate, TunedIndex
from distlm.knnlm.search.neighbours import MANIFEST, Neighbours
from distlm.knnlm.tune.choose import IndexPerplexity
from distlm.runtime.checked import require_whole
from distlm.runtime.progress import say
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.ranks.cores import usable_cores
from distlm.runtime.rundir import RunDir

LEAST_NEIGHBOURS = 10
"""Of the smaller sample."""
SMALLER = 4
"""Two samples where the store has more keys than are asked for: the smaller has a fourth."""
NEARLY_ALL = 0.9
"""A sample of so large a share is the store."""
MOST_CODES = 3
"""Codes that are measured with other numbers of lists."""
FIELDS = tuple(field.name for field in structs.fields(Candidate))


def tune_index(config: RunConfig, factories: Sequence[str], keys: int, queries: int, budget: Budget) -> str:
    """Measure factories on `keys` sampled keys and `queries` others; files in RUN/index-tune, the table as text.

    factories: none names the usual codes, and the best of them with other numbers of lists. Perplexity is measured
    where `knn search` has kept the first split's queries. Memory: the sampled keys as fp32 and a fourth of them. Raises
    DistlmError for a store that is too small, for files that are not as they were written, and when none of the
    factories can be built.
    """
    run, knn = RunDir.of(config), config.knn
    datastore = Datastore.open(run.datastore)
    kept = run.kept_neighbours(knn.splits[0])
    neighbours = Neighbours.open(kept) if (kept / MANIFEST).exists() else None
    if config.launch.verify:
        require_whole(SingleComm(), datastore.folder, datastore.written(values=neighbours is not None), "index tune")
        if neighbours is not None:
            require_whole(SingleComm(), neighbours.folder, neighbours.written(), "index tune")
    samples = _samples(datastore, keys, queries, knn.k, config.index.seed)
    question = Question(datastore.rows, min(knn.k, datastore.rows), knn.distances == "exact", config.index.seed)
    perplexity = None
    if neighbours is not None:
        perplexity = IndexPerplexity(neighbours, datastore, samples[-1], knn, queries)
    known: KnownOf = {}

    def measured_of(asked: Sequence[Proposal]) -> tuple[list[Candidate], list[str]]:
        return measure_all(
            asked, samples, question, lambda what: say(f"index tune: {what}"), perplexity, known
        )  # fmt: skip

    if factories:
        measured, messages = measured_of([asked_for(text, datastore.rows) for text in factories])
    else:
        codes = code_proposals(datastore.width, datastore.rows, config.index.sample)
        measured, messages = measured_of(codes)
        sizes = [len(sample.keys) for sample in samples]
        best = _best_codes(codes, measured, budget)
        more, others = measured_of(list_proposals(best, datastore.rows, sizes, config.index.sample))
        measured, messages = measured + more, messages + others
    if not measured:
        raise DistlmError(f"none of the factories can be built here: {'; '.join(messages)}")
    for message in dict.fromkeys(messages):
        say(f"index tune: left out: {message}")
    best_of_all = pick(measured, budget)
    TunedIndex(
        datastore=datastore.fingerprint, rows=datastore.rows, k=knn.k, queries=queries, threads=usable_cores(),
        most_bytes=budget.key_bytes, most_ms=budget.query_ms, least_recall=budget.recall,
        pick=best_of_all, measured=measured,
    ).write(run.root / "index-tune" / "pick.json")  # fmt: skip
    return _write(run.root / "index-tune", measured, best_of_all, samples, datastore.rows, perplexity, bool(factories))


def _seen(measured: Sequence[Candidate], front: Sequence[Candidate], best: Candidate | None) -> str:
    """What the plot shows: how many are on the front, and where the pick lies among all."""
    said = f"{len(front)} of {len(measured)} are on the front: no other beats them in bytes, time and recall together."
    if best is None:
        return f"{said} None stays within the budget."
    fastest = min(measured, key=lambda one: one.whole_ms)
    highest = max(measured, key=lambda one: one.store_recall)
    picked, quick, thorough = (f"{one.store_recall:.1%} in {one.whole_ms:.2f} ms" for one in (best, fastest, highest))
    return f"{said} The pick finds {picked}; the fastest {quick}, the most thorough {thorough}."


def _samples(datastore: Datastore, keys: int, queries: int, k: int, seed: int) -> list[Sample]:
    """One sample, or two, the smaller first. k neighbours of the whole store are a share of it, and so in each."""
    count = min(keys, datastore.rows - queries)
    if count >= NEARLY_ALL * datastore.rows:
        return [draw_sample(datastore, count, queries, min(k, count), seed)]
    share = k / datastore.rows
    few = max(1, count // SMALLER)
    least = min(few, max(LEAST_NEIGHBOURS, round(share * few)))
    whole = draw_sample(datastore, count, queries, max(1, round(least * count / few)), seed)
    return [whole.part(few, least, seed), whole]


def _best_codes(codes: Sequence[Proposal], measured: Sequence[Candidate], budget: Budget) -> list[Proposal]:
    """Of the codes on the front, within the budget's bytes where there are any, those of the best recall."""
    front = [one for one in pareto(measured) if not budget.key_bytes or one.key_bytes <= budget.key_bytes]
    names = dict.fromkeys(one.factory for one in sorted(front, key=lambda one: -one.store_recall))
    return [code for name in list(names)[:MOST_CODES] for code in codes if code.factory == name]


def _write(
    folder: Path, measured: Sequence[Candidate], best: Candidate | None, samples: Sequence[Sample], rows: int,
    perplexity: IndexPerplexity | None, every: bool,
) -> str:  # fmt: skip
    """The table (of the front alone unless `every`), CSV and plot."""
    front, k = pareto(measured), samples[-1].exact.shape[1]
    head = ("factory", "nprobe", "candidates", "bytes/key", f"recall@{k}", "ms/query", "in the store: recall",
            "ms/query", "exact ms", "keys/s added", "train s", "perplexity per token", "")  # fmt: skip
    cells = [
        (one.factory, str(one.nprobe), str(one.candidates), str(one.key_bytes), f"{one.recall:.3f}",
         f"{one.query_ms:.2f}", f"{one.store_recall:.3f}", f"{one.store_ms:.2f}", f"{one.rescore_ms:.2f}",
         f"{one.add_keys_s:.0f}", f"{one.train_s:.1f}", "-" if one.perplexity is None else f"{one.perplexity:.2f}",
         "pick" if one == best else "front" if one in front else "")
        for one in (measured if every else front)
    ]  # fmt: skip
    lines = [markdown(head, cells), ""]
    if not every:
        lines.append(
            f"The {len(front)} of {len(measured)} that no other beats in bytes, time and recall together; "
            "factories.csv has all."
        )
    counts = " and ".join(str(len(sample.keys)) for sample in samples)
    lines.append(
        f"Measured on {counts} sampled keys of {rows}"
        + ("; what the whole store gives is extrapolated from both." if len(samples) > 1 else ".")
    )
    if perplexity is not None:
        lines.append(
            f"Perplexity per token of the LM alone on the same {len(perplexity.targets)} tokens: "
            f"{perplexity.of_lm:.2f}."
        )
    if best is None:
        lines.append("Nothing measured stays within the budget.")
    else:
        more = f" knn.candidates={best.candidates}" if best.rescore_ms else ""
        lines.append(f"pick: index.factory={best.factory} knn.nprobe={best.nprobe}{more}")
    text = "\n".join(lines)
    write_csv(folder / "factories.csv", FIELDS, [[getattr(one, name) for name in FIELDS] for one in measured])
    label = f"recall@{k} in the store"
    write_picture(
        folder / "factories.png", recall_over_time(measured, front, best, label, _seen(measured, front, best))
    )
    write_text(folder / "factories.md", text)
    return f"{text}\n\n{folder}/factories.{{md,csv,png}}"
