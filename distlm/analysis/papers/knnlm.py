"""The figures of `distlm reproduce knnlm` (Khandelwal et al. 2020, sections 4 and 5), from what is finished.

Datastores of parts of train are compared on all of valid and test: `check_settings` and the tables refuse parts that
are shorter than these, which would be cut with them (data.first_words).

processor.csv   processor time of each run
table.md        perplexity alone and with neighbours of every datastore: parts of train, all of it, another domain
stores.csv      the same with all digits, and the λ, T and k that valid chose
k.csv, .png     perplexity on valid over the number of neighbours, at the best λ and T of each
lambda.csv, .png  perplexity on valid over λ, at the best T and k of each
words.csv       the words that neighbours help and harm most on valid
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distlm.analysis.evaluations import open_evaluations
from distlm.analysis.plots.mixtures import perplexity_over_k, perplexity_over_weight
from distlm.analysis.processor import PROCESSOR_TABLE, processor_rows, write_processor_time
from distlm.analysis.results.from_csv import figure, lines_of, percent
from distlm.analysis.results.records import ResultRow, ResultsPath
from distlm.analysis.results.verdict import above, lower
from distlm.analysis.tables import markdown, nothing_finished, write_csv, write_picture, write_text
from distlm.analysis.words import word_changes
from distlm.config.schema import RunConfig
from distlm.data.corpus import words_of_split
from distlm.data.records import TokensMeta
from distlm.data.tokens import META
from distlm.errors import DistlmError, UsageError
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.tune.records import Tuned
from distlm.models.perplexity import perplexities
from distlm.runtime.records import given
from distlm.runtime.rundir import RunDir

PATH: ResultsPath = "kNN-LM"
TABLES = {
    "stores.csv": "perplexity with datastores of several sizes and of another domain",
    "k.csv": "perplexity on valid over k", "lambda.csv": "perplexity on valid over λ",
    "words.csv": "words that neighbours help and harm most on valid",
    PROCESSOR_TABLE: "processor time, all starts of a run together",
}  # fmt: skip
NOTES = (
    "Perplexity per word; λ, T and k tuned on valid of each datastore. One model for all. The paper's sizes are "
    "parts of 3 billion words of Wikipedia, and its other domain is books. A text of another domain has more `<unk>`, "
    "all the more where it is not cut into words as train is; they are predicted like any word, so that perplexities "
    "of two texts are not of one scale.",
)
WHOLE, DOMAIN = "whole", "domain"
_PART = "words-"
"""Beginning of the name of a run over part of train; its words follow."""
_SPLITS = ("valid", "test")
_UNKNOWN = ("valid_unk", "test_unk")
"""Columns of their shares of `<unk>`, in %."""
_DOMAIN_PAPER = (37.13, 24.85)
"""On valid of books: a model of 3 billion words of Wikipedia alone, and with a datastore of books (table 4)."""
_SHOWN_WORDS = 15
"""Of each end."""


@dataclass(frozen=True)
class Store:
    """One finished run."""

    run: str
    results: Results
    tuned: Tuned

    @property
    def keys(self) -> int:
        """Rows of its datastore."""
        assert self.results.datastore is not None
        return self.results.datastore.rows


def check_settings(configs: Mapping[str, RunConfig]) -> None:
    """Refuse parts of train that are shorter than the splits on which all datastores are compared.

    `configs`: of the runs, by name. Raises UsageError naming the least number of words, and DistlmError for text that
    cannot be read.
    """
    parts = [config for name, config in configs.items() if name.startswith(_PART)]
    # With data.first_words for every run, all have the same part of each split.
    lengths = [one.data.first_words for one in parts if one.data.first_words != configs[WHOLE].data.first_words]
    if not lengths:
        return
    words = {split: words_of_split(parts[0].data, split) for split in _SPLITS if split in parts[0].knn.splits}
    least = max(words.values())
    if min(lengths) < least:
        counts = ", ".join(f"{split} has {count:,}" for split, count in words.items())
        raise UsageError(
            f"words=[{','.join(map(str, lengths))}]: {min(lengths)} words cut not train alone ({counts}, ends of lines "
            f"counted), and perplexities of different texts cannot be compared; give no fewer than {least}"
        )


def _require_same_text(root: Path, stores: Iterable[Store]) -> None:
    """As check_settings, of runs that are there. Raises DistlmError."""
    stores = [one for one in stores if one.run != DOMAIN]
    for split in _SPLITS:
        tokens = {one.run: one.results.splits[split].tokens for one in stores if split in one.results.splits}
        longest = max(tokens.values(), default=0)
        if short := [run for run, count in tokens.items() if count < longest]:
            raise DistlmError(
                f"{root / short[0]}: has the perplexity of {tokens[short[0]]:,} tokens of {split}, others that of "
                f"{longest:,}: texts of different length cannot be compared; remove this run, and give words=[…] of no "
                f"fewer than {longest}"
            )


def write_tables(root: Path) -> str:
    """Write what there is the data for; the table as text. Raises DistlmError where there is none, and for runs that
    are measured on different texts."""
    stores = sorted((store for folder in root.glob("*") if (store := _read(folder))), key=lambda one: one.keys)
    if not stores:
        raise nothing_finished(root)
    _require_same_text(root, stores)
    stores.sort(key=lambda one: one.run == DOMAIN)
    rows, raw = [], []
    for one in stores:
        settings = given(one.tuned.weight), given(one.tuned.temperature), given(one.tuned.k)
        numbers = [_perplexity(one.results, split, part) for split in _SPLITS for part in ("lm", "knn")]
        unknown = _unknown(root, one.run)
        rows.append([
            _words(one.run), f"{one.keys:,}", *map(_number, numbers), *map("{:g}".format, settings),
            " / ".join(f"{share:.1f}" for share in unknown),
        ])  # fmt: skip
        raw.append([
            one.run, one.keys, *("" if number is None else number for number in numbers), *settings,
            *(unknown or ("", "")),
        ])  # fmt: skip
    columns = [f"{split} {what}" for split in _SPLITS for what in ("LM", "+ kNN")]
    names = [column.replace("+ ", "").replace(" ", "_") for column in columns]
    write_csv(root / "stores.csv", ["run", "keys", *names, "lambda", "temperature", "k", *_UNKNOWN], raw)
    write_processor_time(root)
    table = markdown(["datastore", "keys", *columns, "λ", "T", "k", "valid / test `<unk>` %"], rows)
    write_text(root / "table.md", table)
    whole = next((one for one in stores if one.run == WHOLE), None)
    if whole is not None:
        _curves(root, whole)
        _word_by_word(root)
    return f"{table}\n\ntables and figures: {root}"


def rows(root: Path) -> list[ResultRow]:
    """What the paper says of k, of the size of the datastore and of another domain, and whether it is seen."""
    made: list[ResultRow] = []
    over_k = [(int(line["k"]), float(line["valid"])) for line in lines_of(root / "k.csv")]
    if len(over_k) > 1:
        (least, first), (most, last) = over_k[0], over_k[-1]
        row = ResultRow(f"+ kNN on valid: k = {least}; {most}", figure("{:.2f}; {:.2f}", first, last), 0)
        row.finding, row.verdict = "more neighbours are better", lower(last, first)
        made.append(row)
    found = {line["run"]: line for line in lines_of(root / "stores.csv")}
    parts = [line for run, line in found.items() if run not in (WHOLE, DOMAIN)]
    if parts and WHOLE in found:
        small, whole = parts[0], found[WHOLE]
        keys = f"{int(small['keys']):,}; {int(whole['keys']):,}"
        numbers = float(small["valid_kNN"]), float(whole["valid_kNN"])
        row = ResultRow(f"+ kNN on valid with {keys} keys", figure("{:.2f}; {:.2f}", *numbers), 0)
        row.finding, row.verdict = "a larger datastore is better", lower(numbers[1], numbers[0])
        made.append(row)
        weights = float(small["lambda"]), float(whole["lambda"])
        row = ResultRow("the λ that valid chooses for them", figure("{:.2f}; {:.2f}", *weights), 0)
        row.finding, row.verdict = "the best λ grows with the datastore", above(weights[1], weights[0], 0.0)
        made.append(row)
    if DOMAIN in found:
        line = found[DOMAIN]
        numbers = float(line["valid_LM"]), float(line["valid_kNN"])
        unknown = [float(line[column]) for column in _UNKNOWN if line[column]]
        shown = "{:.2f} → {:.2f}" + (f"; `<unk>` {' / '.join(['{:.1f}'] * len(unknown))} %" if unknown else "")
        of_unknown = "; share of `<unk>` of valid / test" if unknown else ""
        row = ResultRow(
            f"another domain, its own datastore: LM → + kNN, valid{of_unknown}", figure(shown, *numbers, *unknown), 0,
            paper=figure("{:.2f} → {:.2f}", *_DOMAIN_PAPER),
        )  # fmt: skip
        row.finding, row.verdict = "a datastore adapts the model to a domain", lower(numbers[1], numbers[0])
        made.append(row)
    return [*made, *processor_rows(root)]


def _read(folder: Path) -> Store | None:
    run = RunDir(folder)
    if not (run.results.exists() and run.tuned.exists()):
        return None
    results, tuned = Results.read(run.results), Tuned.read(run.tuned)
    found = results.datastore is not None and tuned.grid and tuned.split == "valid"
    return Store(folder.name, results, tuned) if found else None


def _unknown(root: Path, run: str) -> list[float]:
    """Share of `<unk>` of a run's valid and test in %; empty where its token files are not there. The run of all of
    train shares those of the experiment."""
    places = (root / run / "tokens" / META, root / "tokens" / "tokens" / META)
    path = next((path for path in places if path.exists()), None)
    if path is None:
        return []
    splits = TokensMeta.read(path).splits
    return [percent(splits[split].unk / splits[split].tokens) for split in _SPLITS]


def _perplexity(results: Results, split: str, part: str) -> float | None:
    found = results.splits.get(split)
    figures = found and found.of(part)
    return figures.perplexity if figures else None


def _words(run: str) -> str:
    if run == WHOLE:
        return "all of train"
    return "another domain" if run == DOMAIN else f"{int(run.removeprefix(_PART)):,} words of train"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _curves(root: Path, whole: Store) -> None:
    grid = given(whole.tuned.grid)
    losses = np.array(grid.loss_nats)
    # Per word, as the table: nats per token times tokens per word.
    figures = whole.results.splits[whole.tuned.split].figures("knn")
    scale = np.log(figures.perplexity) / figures.loss_nats
    for name, settings, best in (
        ("k", grid.ks, losses.min(axis=(1, 2))), ("lambda", grid.lambdas, losses.min(axis=(0, 1)))
    ):  # fmt: skip
        points = sorted(zip(settings, perplexities(scale * best).tolist(), strict=True))
        write_csv(root / f"{name}.csv", [name, "valid"], points)
    write_picture(root / "k.png", perplexity_over_k(whole.tuned))
    write_picture(root / "lambda.png", perplexity_over_weight(whole.tuned))


def _word_by_word(root: Path) -> None:
    run = RunDir(root / WHOLE)
    if not all((run.losses / "valid" / f"{name}.npy").exists() for name in ("lm", "knn")):
        return
    before, after = open_evaluations([f"{run.root}:lm", f"{run.root}:knn"], "valid", ())
    changes = word_changes(before.losses, after.losses)
    ends = changes if len(changes) <= 2 * _SHOWN_WORDS else [*changes[:_SHOWN_WORDS], *changes[-_SHOWN_WORDS:]]
    rows = [[row.word, row.count, row.change, row.before, row.after] for row in ends]
    write_csv(root / "words.csv", ["word", "count", "change_nats", "before_nats", "after_nats"], rows)
