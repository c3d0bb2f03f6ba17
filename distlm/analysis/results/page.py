"""docs/results.md, and the tables of one experiment, from the records in results/."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from distlm.analysis.results.records import ExperimentResults, Figure, Number, ResultRow, ResultsPath, ResultTable
from distlm.errors import DistlmError
from distlm.runtime.records import given

_HEAD = """# Results

Made from `results/*.json` by `python -m distlm.results_page > docs/results.md`; a test compares. A letter behind a
figure names the command below the table that gives it. Each file has date, machine, settings and more figures;
`python -m distlm.results_page NAME` prints all its tables. "Appears" says that the paper's finding is seen in our
figures at our size, "cannot be said" that the difference is within what one seed or the noise moves: of several seeds,
and over the rows of a dev set, what Student's t allows at 95 %; of the perplexities of one seed 1 %. For a part of the
AWD-LSTM the finding is that removing it raises perplexity. The machine "2 cores" is 2 virtual cores (AMD EPYC with
AVX-512), 24 GiB, no GPU; other work shared it: read ratios rather than seconds.
No figure is of a GPU: none was at hand so far. [`make gpu-check`](gpu.md#one-command) measures what belongs here.
"""
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<!\d)\.\d+")
_ROW_HEAD = ["measured", "ours", "paper", "the paper's finding", "command"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def read_results(folder: Path) -> dict[str, ExperimentResults]:
    """Name → record of every results/NAME.json, by section and name.

    Raises DistlmError naming the file for one that is not valid, and when there is none.
    """
    found = {path.stem: _checked(path) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise DistlmError(f"{folder}: no results/NAME.json; run this in the project's folder")
    paths = get_args(ResultsPath)
    return dict(sorted(found.items(), key=lambda each: (paths.index(each[1].path), each[0])))


def page(results: dict[str, ExperimentResults]) -> str:
    """The page as Markdown."""
    lines = [_HEAD]
    for path in get_args(ResultsPath):
        of_path = {name: record for name, record in results.items() if record.path == path}
        if of_path:
            lines += [f"## {path}", "", *_section(of_path), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def tables(record: ExperimentResults) -> str:
    """All that a record says, its tables whole, as Markdown."""
    lines = [f"# {record.title}", "", _facts(record), "", "```sh", *map(_typed, record.commands), "```", ""]
    lines += [*lines_of_rows((row.what, row, _letter(row.command)) for row in record.rows), ""]
    for table in record.tables:
        lines += [f"## {table.title}", "", *_table(table), ""]
    return "\n".join([*lines, *record.notes]).rstrip("\n") + "\n"


def numbers(record: ExperimentResults) -> set[float]:
    """Every number that a record has measured or quotes, without its sign."""
    figures = [figure for row in record.rows for figure in (row.ours, row.paper) if isinstance(figure, Figure)]
    cells = [cell for table in record.tables for line in table.rows for cell in line]
    found = [*(number for figure in figures for number in figure.numbers), *cells]
    texts = [cell for cell in cells if isinstance(cell, str)] + [*record.settings, *record.notes]
    texts += [text for row in record.rows for text in (row.what, row.ours.text())]
    return {abs(float(each)) for each in found if isinstance(each, int | float)} | {
        number for text in texts for number in numbers_of(text)
    }


def numbers_of(text: str) -> list[float]:
    """The numbers in a text, without their signs."""
    return [float(number.replace(",", "")) for number in _NUMBER.findall(text)]


def _checked(path: Path) -> ExperimentResults:
    record = ExperimentResults.read(path)
    try:
        for row in record.rows:
            row.ours.text()
            if isinstance(row.paper, Figure):
                row.paper.text()
            if not 0 <= row.command < len(record.commands):
                raise ValueError(f"row {row.what!r} is of command {row.command}, of {len(record.commands)}")
        for table in record.tables:
            _table(table)
    except (ValueError, IndexError) as error:
        raise DistlmError(f"{path}: {record.WHAT}: {error}") from error
    return record


def _section(results: dict[str, ExperimentResults]) -> list[str]:
    """The table of a section and, for each record, what its figures are of and how they are made."""
    rows: list[tuple[str, ResultRow, str]] = []
    texts, number = [], 0
    for name, record in results.items():
        if not record.rows:
            continue
        letters = [_letter(number + place) for place in range(len(record.commands))]
        number += len(letters)
        titles = [f"**{record.title}**: ", *[""] * len(record.rows)]
        rows += [
            (f"{title}{row.what}", row, letters[row.command]) for title, row in zip(titles, record.rows, strict=False)
        ]
        pairs = zip(letters, map(_typed, record.commands), strict=True)
        commands = " · ".join(f"**{letter}** `{words}`" for letter, words in pairs)
        texts.append(f"- `results/{name}.json`: {_facts(record)} {' '.join([*record.notes, commands])}")
    if others := [f"`{name}` ({record.title})" for name, record in results.items() if not record.rows]:
        texts.append(f"- Tables alone, with `python -m distlm.results_page NAME`: {', '.join(others)}.")
    return [*lines_of_rows(rows), "", *texts]


def _typed(command: str) -> str:
    """A command with its lists quoted: zsh takes the brackets of an unquoted one for a pattern."""
    return re.sub(r"(?<=\s)[^\s'\"]*\[[^\s'\"]*", r"'\g<0>'", command)


def _letter(number: int) -> str:
    return _LETTERS[number] if number < len(_LETTERS) else _LETTERS[number // 26 - 1] + _LETTERS[number % 26]


def _facts(record: ExperimentResults) -> str:
    commit = [] if record.commit is None else [f"commit {record.commit}"]
    return f"{'; '.join([record.date, record.machine, *record.settings, *commit])}."


def lines_of_rows(rows: Iterable[tuple[str, ResultRow, str]]) -> list[str]:
    """A table of Markdown, line by line, of rows with their titles and the letters of their commands."""
    body = []
    for what, row, command in rows:
        paper = row.paper.text() if isinstance(row.paper, Figure) else ""
        found = f"**{given(row.verdict)}**: {given(row.finding)}" if isinstance(row.finding, str) else ""
        body.append([what, row.ours.text(), paper, found, command])
    # A section without a paper has no columns for one.
    kept = [place for place, column in enumerate(zip(*body, strict=True)) if any(column)]
    lines = [_line([line[place] for place in kept]) for line in [_ROW_HEAD, *body]]
    return [lines[0], "|---" * len(kept) + "|", *lines[1:]] if body else []


def _table(table: ResultTable) -> list[str]:
    rows = [[_cell(cell, column.shown) for cell, column in zip(row, table.columns, strict=True)] for row in table.rows]
    return [_line([column.name for column in table.columns]), "|---" * len(table.columns) + "|", *map(_line, rows)]


def _cell(cell: str | Number | None, shown: str) -> str:
    if cell is None:
        return ""
    return cell if isinstance(cell, str) else format(cell, shown)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
