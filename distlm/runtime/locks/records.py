"""The record of who writes in a folder."""

from distlm.runtime.records import Record


class LockOwner(Record):
    """Who writes in a folder, rewritten every two seconds while it does. N rises with each owner; the highest holds."""

    FILE = "FOLDER/.lock.N"
    WHAT = "owner of a folder"
    WRITER = "every stage, in the folders that it writes"
    READERS = ("stages that want to write there",)
    MEND = "delete it where no run writes in its folder"

    name: str
    """Random: no two owners have the same."""
    owner: str
    """Slurm job, process, node and time of its start, for people."""
    work: str
    """What it does here, for people."""
    job: str
    """Slurm job, JOB_TASK in an array; empty: none."""
    restarts: int
    """How often that job had been requeued."""
    place: str
    """Where its process can be seen: boot of the machine and process namespace."""
    pid: int
    """Its process there."""
    started: str
    """When that process started, in the kernel's ticks since boot; empty: not known."""
    locked: bool
    """It also holds the file system's lock, and that holds on all nodes."""
    beat: int
    """How often this file was written; a number that stands still is silence."""
    ended: bool
    """The owner gave the folder back."""
