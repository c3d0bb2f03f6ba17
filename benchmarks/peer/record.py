"""The record of all comparisons: the one table, and a line of docs/results.md for each."""

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from shared.command import NO_FIGURES
from shared.machine import in_words

from distlm.analysis.results.records import ExperimentResults, Figure, Number, ResultColumn, ResultRow, ResultTable
from distlm.runtime.rundir import code_version
from distlm.runtime.speeds import machine
from peer.turn import OURS, Turn

COLUMNS = [
    ResultColumn("what"), ResultColumn("peer"), ResultColumn("tokens/s, distlm", ",.0f"),
    ResultColumn("tokens/s, peer", ",.0f"), ResultColumn("times as fast, median", ".2f"), ResultColumn("least", ".2f"),
    ResultColumn("most", ".2f"), ResultColumn("perplexity, distlm", ".2f"), ResultColumn("perplexity, peer", ".2f"),
    ResultColumn("turns"), ResultColumn("size"),
]  # fmt: skip
NOTES = [
    "Each comparison is a process of its own, in which distlm and its peers take turns: tokens/s are medians over the "
    "turns, ratios are of one turn.",
    "The plain AWD-LSTM at its best looks the mask of words up by row and hands torch the step's weights directly.",
    "By default knn-transformers scores with the distances that the index has and reads no key: its perplexity is "
    "another one. distlm reads the keys here; knn.distances=quantised, its way without them, is not in the table.",
    "Perplexities of training steps are of valid after the updates; of the AWD-LSTM after one step without dropout.",
]


class Found(NamedTuple):
    """What came of a comparison."""

    what: str
    turns: Sequence[Turn]
    why: str = ""
    """Why there are not more turns; empty: it ended well."""


class Against(NamedTuple):
    """distlm against one peer, over the turns."""

    peer: str
    ours: float
    """Tokens/s, the median."""
    theirs: float
    ratio: float
    """ours / theirs within a turn: the median."""
    least: float
    most: float
    perplexity: float
    """Of the last turn."""
    their_perplexity: float


def against(turns: Sequence[Turn]) -> list[Against]:
    """Each peer of a comparison that had at least one turn."""
    rates = {name: [turn.sides[name].tokens_per_s for turn in turns] for name in turns[0].sides}
    last, found = turns[-1].sides, []
    for peer in (name for name in rates if name != OURS):
        ratios = [mine / other for mine, other in zip(rates[OURS], rates[peer], strict=True)]
        found.append(
            Against(
                peer, statistics.median(rates[OURS]), statistics.median(rates[peer]), statistics.median(ratios),
                min(ratios), max(ratios), last[OURS].perplexity, last[peer].perplexity,
            )
        )  # fmt: skip
    return found


def record(found: Sequence[Found], command: str, settings: list[str], quick: bool) -> ExperimentResults:
    """One that was ended early is in the table with the turns that it had; the notes say why."""
    rows, cells = [], []
    for one in found:
        if one.turns:
            rows.append(_row(one))
            cells += [_cells(one, each) for each in against(one.turns)]
    ended = [f"{one.what}: {one.why}." for one in found if one.why]
    return ExperimentResults(
        title="Tokens a second and perplexity beside peers, in one run", path="Speed",
        date=datetime.now(UTC).date().isoformat(), machine=machine(), commit=code_version().git, commands=[command],
        settings=settings, rows=rows, tables=[ResultTable("tokens a second and perplexity", COLUMNS, cells)],
        notes=[*([NO_FIGURES] if quick else []), *NOTES, *ended, in_words()],
    )  # fmt: skip


def _cells(one: Found, each: Against) -> list[str | Number | None]:
    peer, *numbers = each
    return [one.what, peer, *numbers, len(one.turns), one.turns[-1].size]


def _row(one: Found) -> ResultRow:
    peers = against(one.turns)
    ratios = [number for each in peers for number in (each.ratio, each.least, each.most)]
    perplexities = [peers[0].perplexity, *(each.their_perplexity for each in peers)]
    shown = ["; ".join(["{:.2f} ({:.2f} to {:.2f})"] * len(peers)), ", ".join(["{:.2f}"] * len(perplexities))]
    return ResultRow(
        f"{one.what}: tokens/s; times as fast as {'; '.join(each.peer for each in peers)}; perplexities",
        Figure("; ".join(["{:,.0f}", *shown]), [peers[0].ours, *ratios, *perplexities]), 0,
    )  # fmt: skip
