"""The record of how an experiment's folder came about."""

from distlm.runtime.records import Part, Record


class ExperimentCall(Part):
    """One way in which `distlm reproduce` was called."""

    command: str
    """What was typed, without --only, --at-once, --into and settings that hold for one start alone; of absolute paths
    the last part, behind /path/to/."""
    runs: list[str]
    """Names of the runs that it was called for, those of all `--only` together, sorted."""


class ExperimentCalls(Record):
    """The calls of `distlm reproduce` that ran something in an experiment's folder, each once. `results.json` has their
    commands; folders of older versions have no such file."""

    FILE = "EXPERIMENT/calls.json"
    WHAT = "record of an experiment's calls"
    WRITER = "distlm reproduce"
    READERS = ("distlm reproduce",)
    MEND = "delete it; results.json then has the command of the call that writes it"

    calls: list[ExperimentCall]
    """In the order in which they first came."""
