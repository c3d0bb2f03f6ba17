"""`distlm index tune`: what was measured as a table, CSV and plot, and the pick for a budget."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from distlm.analysis.plots import recall_over_time
from distlm.analysis.tables import markdown, write_csv, write_picture, write_text
from distlm.config.schema import RunConfig
from distlm.datastore.reader import Datastore
from distlm.index.choose.measure import Budget, Measured, choose, default_factories, draw_sample, pareto, pick
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.tune.choose import IndexPerplexity
from distlm.runtime.files import write_json
from distlm.runtime.progress import say
from distlm.runtime.rundir import RunDir

LEAST_NEIGHBOURS = 10
FIELDS = tuple(field.name for field in dataclasses.fields(Measured))


def tune_index(config: RunConfig, factories: Sequence[str], keys: int, queries: int, budget: Budget) -> str:
    """Measure factories on `keys` sampled keys and `queries` others; files in RUN/index-tune, the table as text.

    factories: none names the usual ones for this width and the lists of index.factory. Perplexity is measured where
    `knn search` has kept the first split's queries. Raises DistlmError for a store that is too small.
    """
    run = RunDir.of(config)
    datastore = Datastore.open(run.datastore)
    # Of a tenth of the keys a tenth of the neighbours: they reach as far from a query as k do in the whole store.
    k = max(LEAST_NEIGHBOURS, round(config.knn.k * min(1.0, keys / datastore.rows)))
    sample = draw_sample(datastore, keys, queries, k, config.index.seed)
    found = re.search(r"IVF(\d+)", config.index.factory)
    wanted = list(factories) or default_factories(datastore.width, int(found[1]) if found else 1024)
    perplexity = None
    if (kept := run.kept_neighbours(config.knn.splits[0]) / "manifest.json").exists():
        perplexity = IndexPerplexity(Neighbours.open(kept.parent), datastore, sample,
                                     config.knn, queries)  # fmt: skip
    measured, messages = choose(
        sample, wanted, k, config.index.seed, lambda what: say(f"index tune: {what}"), perplexity
    )
    for message in messages:
        say(f"index tune: left out: {message}")
    return _write(run.root / "index-tune", measured, budget, k, len(sample.keys), perplexity)


def _write(
    folder: Path, measured: Sequence[Measured], budget: Budget, k: int, keys: int, perplexity: IndexPerplexity | None
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    front, best = pareto(measured), pick(measured, budget)
    head = (
        "factory",
        "nprobe",
        "bytes/key",
        f"recall@{k}",
        "ms/query",
        "keys/s added",
        "train s",
        "perplexity per token",
        "",
    )
    rows = [
        (one.factory, str(one.nprobe), str(one.key_bytes), f"{one.recall:.3f}", f"{one.query_ms:.2f}",
         f"{one.add_keys_s:.0f}", f"{one.train_s:.1f}", "-" if one.perplexity is None else f"{one.perplexity:.2f}",
         "pick" if one == best else "front" if one in front else "")
        for one in measured
    ]  # fmt: skip
    lines = [
        markdown(head, rows),
        "",
        f"{keys} sampled keys; lists are as many, and shorter, than in the whole store, so searching it takes longer.",
    ]
    if perplexity is not None:
        lines.append(
            f"Perplexity per token of the LM alone on the same {len(perplexity.targets)} tokens: "
            f"{perplexity.of_lm:.2f}."
        )
    if best is None:
        lines.append("Nothing measured stays within the budget.")
    else:
        lines.append(f"pick: index.factory={best.factory} knn.nprobe={best.nprobe}")
    text = "\n".join(lines)
    write_csv(folder / "factories.csv", FIELDS, [[getattr(one, name) for name in FIELDS] for one in measured])
    write_picture(folder / "factories.png", recall_over_time(measured, front, f"recall@{k}"))
    write_text(folder / "factories.md", text)
    write_json(folder / "pick.json", None if best is None else dataclasses.asdict(best))
    return f"{text}\n\n{folder}/factories.{{md,csv,png}}"
