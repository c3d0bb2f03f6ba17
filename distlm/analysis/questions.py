"""All questions that a run's store was asked, side by side: one table, and perplexity over the time of the search."""

from collections.abc import Sequence
from dataclasses import dataclass

from distlm.analysis.tables import Table, markdown, write_csv, write_text
from distlm.knnlm.evaluate.records import Results
from distlm.runtime import metrics
from distlm.runtime.rundir import RunDir


@dataclass(frozen=True)
class Answer:
    """The results of one question."""

    label: str
    index: str
    """faiss factory, or brute force."""
    key_bytes: float | None
    """Bytes of the index a key; None: brute force."""
    nprobe: int | None
    k: int
    """Neighbours that were mixed in: the best number that tuning tried."""
    recall: float | None
    """Share of the true k nearest that were used, on the ladder's sample; None where it was not measured."""
    search_s: float | None
    """Seconds of the searches; None: kept neighbours of a larger k answered, or an older version searched."""
    perplexity: dict[str, float]
    """Split → perplexity per word with neighbours."""
    alone: dict[str, float]
    """Split → perplexity per word of the language model."""


def answers(run: RunDir) -> list[Answer]:
    """Of every file of results with neighbours, by label. Raises DistlmError for one that cannot be read."""
    seconds: dict[str, float] = {}
    for line in run.metrics.read("knn search"):
        label = line.values.get(metrics.QUESTION)
        if isinstance(label, str):
            seconds[label] = seconds.get(label, 0.0) + (line.number(metrics.STAGE_SECONDS) or 0.0)
    found = ((label, Results.read(path)) for label, path in run.all_results().items())
    return [_answer(label, results, seconds.get(label)) for label, results in found if "knn" in results.mixtures()]


def answers_table(found: Sequence[Answer]) -> str:
    """For people."""
    head, rows = table_rows(found)
    return markdown(head, rows)


def table_rows(found: Sequence[Answer]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table."""
    splits = list(dict.fromkeys(split for one in found for split in one.perplexity))
    head = [
        "question",
        "index",
        "bytes/key",
        "nprobe",
        "k used",
        "recall",
        "search s",
        *(f"{split} ppl per word" for split in splits),
    ]
    rows = [
        [one.label, one.index, _number(one.key_bytes, ".1f"), _number(one.nprobe, "d"), str(one.k),
         _number(one.recall, ".3f"), _number(one.search_s, ".1f"),
         *(_number(one.perplexity.get(split), ".2f") for split in splits)]
        for one in found
    ]  # fmt: skip
    alone = {split: one.alone[split] for one in found for split in one.alone}
    if alone:
        rows.append(["LM alone", *["-"] * 6, *(_number(alone.get(split), ".2f") for split in splits)])
    return head, rows


def html_table(found: Sequence[Answer]) -> Table:
    """The same with the best recall, time and perplexities marked."""
    head, rows = table_rows(found)
    seconds = head.index("search s")
    return Table.of(head, rows, range(seconds, len(head)), [head.index("recall")])


def write_answers(run: RunDir) -> str:
    """Write RUN/questions.{md,csv}; the table as text."""
    found = answers(run)
    text = answers_table(found)
    write_text(run.root / "questions.md", text)
    head = ["question", "index", "bytes_per_key", "nprobe", "k_used", "recall", "search_seconds", "split", "perplexity",
            "lm_perplexity"]  # fmt: skip
    rows = [
        [one.label, one.index, one.key_bytes, one.nprobe, one.k, one.recall, one.search_s, split, perplexity,
         one.alone[split]]
        for one in found for split, perplexity in one.perplexity.items()
    ]  # fmt: skip
    write_csv(run.root / "questions.csv", head, [["" if cell is None else cell for cell in row] for row in rows])
    return text


def _answer(label: str, results: Results, seconds: float | None) -> Answer:
    settings, index, store = results.settings, results.index, results.datastore
    ladder = results.ladder or None
    rung = ladder and (ladder.rescored if settings.distances == "exact" else ladder.quantised)
    return Answer(
        label, index.factory if index else "brute force", index.bytes / store.rows if index and store else None,
        settings.nprobe or None, settings.k or 0, rung.recall if rung else None, seconds,
        {name: split.figures("knn").perplexity for name, split in results.splits.items()},
        {name: split.lm.perplexity for name, split in results.splits.items()},
    )  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
