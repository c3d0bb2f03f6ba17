"""The record of an experiment's results, which can be copied to results/NAME.json of the source tree."""

from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from distlm.analysis.results.from_csv import table_of
from distlm.analysis.results.records import ExperimentResults
from distlm.reproduce.experiment import Experiment
from distlm.runtime.records import RunCode
from distlm.runtime.rundir import RunDir
from distlm.runtime.speeds import machine

RESULTS = "results.json"
"""In the experiment's folder."""
REPRODUCE = "reproduce"
"""Stage of the lines that an experiment writes into the metrics of its runs."""


def write_results(experiment: Experiment) -> Path:
    """Write results.json from the CSV files of the tables, which are there; its path.

    The commit is that of the runs, null where they have several; the machine is the one that this is called on.
    """
    paper = import_module(experiment.paper)
    root = experiment.root
    tables = [table_of(root / name, title) for name, title in paper.TABLES.items() if (root / name).exists()]
    codes = [RunCode.read(path) for item in experiment.items if (path := item.folder / "code.json").exists()]
    commits = {code.git for code in codes}
    ExperimentResults(
        title=experiment.title, path=paper.PATH, date=_last_day(experiment), machine=machine(),
        commit=commits.pop() if len(commits) == 1 else None, commands=[experiment.command], settings=[],
        rows=paper.rows(root), tables=tables, notes=[*paper.NOTES],
    ).write(root / RESULTS)  # fmt: skip
    return root / RESULTS


def _last_day(experiment: Experiment) -> str:
    """On which a stage of its runs last measured something; without any, today."""
    folders = dict.fromkeys(item.folder for item in experiment.items)
    lines = (line for folder in folders for line in RunDir(folder).metrics.read())
    # A command that had nothing left to do has a line of its own in its run, too.
    times = [line.time for line in lines if line.stage != REPRODUCE]
    return datetime.fromtimestamp(max(times), UTC).date().isoformat() if times else datetime.now(UTC).date().isoformat()
