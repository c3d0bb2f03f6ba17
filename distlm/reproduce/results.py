"""The record of an experiment's results, which can be copied to results/NAME.json of the source tree."""

from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from distlm.analysis.results.from_csv import table_of
from distlm.analysis.results.records import ExperimentResults
from distlm.reproduce.calls import commands_of
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

    All of it is of what lies in the folder, whatever this call chose: the commands are those that made the runs there
    (calls.json), the commit is theirs, null where they have several, and the day their last one. The machine is the one
    that this is called on. Raises DistlmError for a damaged record of the calls or of a run's code.
    """
    paper = import_module(experiment.paper)
    root = experiment.root
    tables = [table_of(root / name, title) for name, title in paper.TABLES.items() if (root / name).exists()]
    commits = {RunCode.read(path).git for path in root.glob("*/code.json")}
    ExperimentResults(
        title=experiment.title, path=paper.PATH, date=_last_day(root), machine=machine(),
        commit=commits.pop() if len(commits) == 1 else None, commands=commands_of(experiment), settings=[],
        rows=paper.rows(root), tables=tables, notes=[*paper.NOTES],
    ).write(root / RESULTS)  # fmt: skip
    return root / RESULTS


def _last_day(root: Path) -> str:
    """On which a stage of the runs there last measured something; without any, today."""
    lines = (line for path in root.glob("*/metrics.jsonl") for line in RunDir(path.parent).metrics.read())
    # A command that had nothing left to do has a line of its own in its run, too.
    times = [line.time for line in lines if line.stage != REPRODUCE]
    return datetime.fromtimestamp(max(times), UTC).date().isoformat() if times else datetime.now(UTC).date().isoformat()
