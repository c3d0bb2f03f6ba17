"""A device that has no memory left: an error that names the settings which need less."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from distlm.errors import DistlmError


@contextmanager
def within_memory(work: str, mend: str) -> Iterator[None]:
    """For the block, torch's OutOfMemoryError is a DistlmError: `work` ran out of memory, and `mend`, which names
    settings, needs less. This rank's alone: the others may have had enough."""
    try:
        yield
    except RuntimeError as error:
        torch = sys.modules["torch"]
        if not isinstance(error, torch.OutOfMemoryError):
            raise
        told = (str(error).strip().splitlines() or ["out of memory"])[0]
        raise DistlmError(f"{work}: {told} {mend}, and run the same command again") from error
