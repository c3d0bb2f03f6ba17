"""The chief figures of `distlm reproduce pkm-plm` beside those of Kim & Jung (2020), from its CSV files."""

import statistics
from collections.abc import Mapping
from pathlib import Path

from distlm.analysis.papers.pkm_plm_models import TOP1_MU
from distlm.analysis.papers.pkm_plm_scores import score_rows
from distlm.analysis.papers.pkm_plm_seeds import seed_rows
from distlm.analysis.papers.pkm_plm_sweep import sweep_rows
from distlm.analysis.papers.seeds import Cell, Difference, model_and_seed, numbers_of, place_of
from distlm.analysis.processor import processor_rows
from distlm.analysis.results.from_csv import figure, lines_of, percent
from distlm.analysis.results.records import Figure, ResultRow, Verdict
from distlm.analysis.results.verdict import MARGIN, MARGIN_OF_USE, above, lower, no_higher, together

_MODELS = {"pkm": "+PKM", "resm": "+ResM", "init-pkm": "+Init +PKM", "init-resm": "+Init +ResM"}
_PAIRS = {
    ("pkm", "dense"): "a memory lowers the perplexity", ("resm", "dense"): "a memory lowers the perplexity",
    ("init-pkm", "init"): "a memory lowers it more than training on", ("init-resm", "init"): "the same",
    ("resm", "pkm"): "ResM is no worse than PKM", ("init-resm", "init-pkm"): "ResM is better than PKM",
}  # fmt: skip
"""Run and the one that it is compared with → what the paper says."""
_NO_WORSE = ("resm", "pkm")
"""Of them the one where being within MARGIN is enough."""
_WORDS = {**_MODELS, "dense": "dense", "init": "dense, as long again"}
_WIKITEXT_2 = {"dense": 3.49, "init": 3.40, "pkm": 3.26, "resm": 3.26, "init-pkm": 3.14, "init-resm": 3.10}
"""Perplexity of masked tokens (table 2)."""


def rows(root: Path) -> list[ResultRow]:
    """Perplexities in pairs, use of the memories, and the scores of the best model; then the sweep and the processor
    time. Where models have several seeds their use is compared over them."""
    use = seed_rows(root) or _use(root)
    return [*_perplexities(root), *use, *score_rows(root), *sweep_rows(root), *processor_rows(root)]


def _perplexities(root: Path) -> list[ResultRow]:
    lines = lines_of(root / "pretraining.csv")
    names = list(lines[0]) if lines else []
    texts = names[2 : names.index("layer")] if lines else []
    texts = list(dict.fromkeys([texts[0], texts[-1]])) if texts else []
    # A run has a line for each of its layers.
    of_run = {line["run"]: line for line in lines}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for run, line in of_run.items():
        model, seed = model_and_seed(run)
        for text in texts:
            if line[text]:
                found.setdefault(model, {}).setdefault(text, {})[seed] = float(line[text])
    made = []
    for (run, other), finding in _PAIRS.items():
        if run not in found or other not in found:
            continue
        both = [text for text in texts if text in found[run] and text in found[other]]
        pairs = [_common(found[run][text], found[other][text]) for text in both]
        if not pairs or not all(own for own, _ in pairs):
            continue
        sides = [[Cell([*side.values()]) for side in of_model] for of_model in zip(*pairs, strict=True)]
        shown = [", ".join(map(place_of, side)) for side in sides]
        numbers = [round(number, 6) for side in sides for cell in side for number in numbers_of(cell)]
        told = f"{shown[0]} ({shown[1]})"
        for apart in (_apart(*pair) for pair in pairs if len(pair[0]) > 1):
            told += ", {:+.2f} ± {:.2f}" if "; " in told else "; seed by seed {:+.2f} ± {:.2f}"
            numbers += [round(apart.mean, 6), round(apart.error or 0.0, 6)]
        row = ResultRow(
            f"{_WORDS[run]} (and {_WORDS[other]}): {', '.join(both)}", figure(told, *numbers), 0,
            paper=figure("WikiText-2 {:.2f} ({:.2f})", _WIKITEXT_2[run], _WIKITEXT_2[other]),
        )  # fmt: skip
        judged = _no_higher if (run, other) == _NO_WORSE else _lower
        row.finding, row.verdict = finding, together(judged(*pair) for pair in pairs)
        made.append(row)
    return made


_BySeed = Mapping[str, float]
"""Seed in words → perplexity. Which tokens are masked follows from the seed, so that models are compared by seed."""


def _common(own: _BySeed, other: _BySeed) -> tuple[_BySeed, _BySeed]:
    """Of the seeds that both have, in one order."""
    seeds = [seed for seed in own if seed in other]
    return {seed: own[seed] for seed in seeds}, {seed: other[seed] for seed in seeds}


def _apart(own: _BySeed, against: _BySeed) -> Difference:
    found = Difference.between(own, against)
    assert found is not None
    return found


def _lower(own: _BySeed, against: _BySeed) -> Verdict:
    """By the differences where both have several seeds, else by the margin of one seed."""
    apart = _apart(own, against)
    if apart.half is not None:
        return apart.falls()
    (ours,), (theirs,) = own.values(), against.values()
    return lower(ours, theirs)


def _no_higher(own: _BySeed, against: _BySeed) -> Verdict:
    """By the same, and no more than MARGIN higher."""
    apart, margin = _apart(own, against), MARGIN * statistics.fmean(against.values())
    return no_higher(apart.mean, margin if apart.half is None else apart.half, margin)


def _use(root: Path) -> list[ResultRow]:
    first: dict[str, list[float]] = {}
    for line in lines_of(root / "pretraining.csv"):
        if line["layer"]:
            first.setdefault(line["run"], []).append(percent(line["top1_mu"]))
    made = []
    for run, dense in (("pkm", "init-pkm"), ("resm", "init-resm")):
        if run in first and dense in first:
            own, published = (first[dense], first[run]), ([*TOP1_MU[dense]], [*TOP1_MU[run]])
            words = f"top-1 MU, layer by layer, of {_MODELS[dense]} (and {_MODELS[run]})"
            row = ResultRow(words, _layers(*own), 0, paper=_layers(*published))
            row.finding = "a model that starts from a dense one uses more of its memory"
            row.verdict = together(above(*pair, MARGIN_OF_USE) for pair in zip(*own, strict=True))
            made.append(row)
    return made


def _layers(own: list[float], other: list[float]) -> Figure:
    shown = " / ".join("{:.1f}" for _ in own)
    return figure(f"{shown} % ({shown} %)", *own, *other)
