"""A file that several ranks filled and that does not hold what they wrote."""

from pathlib import Path

from distlm.errors import DistlmError


def lost_writes(path: Path, again: str) -> DistlmError:
    """What the user is told when its units do not read back; `again`: what the same command does then ("writes")."""
    return DistlmError(
        f"{path}: what several ranks wrote does not read back as it was written: the file system lost writes; run the "
        f"same command again (it {again} this shard anew), with one rank if that does not help"
    )
