"""`python -m distlm.results_page [NAME]`."""

import sys
from pathlib import Path

from distlm.analysis.results.page import page, read_results, tables
from distlm.analysis.results.records import ExperimentResults
from distlm.errors import DistlmError

RESULTS = Path(__file__).resolve().parents[2] / "results"
"""In the source tree; a wheel has none."""


def main(words: list[str]) -> str:
    """What the command line asks for. Raises DistlmError."""
    if not words:
        return page(read_results(RESULTS))
    path = Path(words[0]) if words[0].endswith(".json") else RESULTS / f"{words[0]}.json"
    return tables(ExperimentResults.read(path))


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]), end="")
    except DistlmError as error:
        sys.exit(f"results_page: {error}")
