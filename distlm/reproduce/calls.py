"""With which commands an experiment's folder was made: a later call may have other inputs, lists or settings."""

from distlm.reproduce.experiment import Experiment
from distlm.reproduce.records import ExperimentCall, ExperimentCalls
from distlm.runtime.lock import in_turn

CALLS = "calls.json"
"""In the experiment's folder."""
_LOCK = ".calls.lock"


def record_call(experiment: Experiment) -> None:
    """Add this call to calls.json, before it runs anything: a kill then loses nothing of how the folder came about."""
    root, runs = experiment.root, {item.name for item in experiment.items}
    root.mkdir(parents=True, exist_ok=True)
    with in_turn(root / _LOCK, "recording a call of distlm reproduce", lambda: None):
        path = root / CALLS
        calls = ExperimentCalls.read(path).calls if path.exists() else []
        same = next((call for call in calls if call.command == experiment.command), None)
        if same is None:
            same = ExperimentCall(experiment.command, [])
            calls.append(same)
        same.runs = sorted(runs.union(same.runs))
        ExperimentCalls(calls=calls).write(path)


def commands_of(experiment: Experiment) -> list[str]:
    """Commands that made what lies in the folder, the one of the most runs first; this call's where none is recorded.
    Raises DistlmError for a damaged calls.json."""
    path = experiment.root / CALLS
    calls = ExperimentCalls.read(path).calls if path.exists() else []
    return [call.command for call in sorted(calls, key=lambda call: -len(call.runs))] or [experiment.command]
