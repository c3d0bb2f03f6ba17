"""What a view keeps of itself."""

from distlm.runtime.records import Record


class WandbRun(Record):
    """Which run of W&B shows these metrics, over all stages and restarts."""

    FILE = "RUN/wandb/run.json"
    WHAT = "run of W&B"
    WRITER = "every stage with train.trackers=[wandb]"
    READERS = ("every stage with train.trackers=[wandb]",)
    MEND = "delete it: the metrics then are a new run of W&B"

    id: str
    """Its id at W&B."""
