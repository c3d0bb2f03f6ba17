"""What an mpirun that distlm starts finds in its environment: a session folder of its own, and leave to run as root."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

_BASE = "PRTE_MCA_prte_tmpdir_base"
# mpirun refuses these beside the one above.
_APART = ("PRTE_MCA_prte_local_tmpdir_base", "PRTE_MCA_prte_remote_tmpdir_base")

ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
"""Open MPI refuses root unless both are set; containers and CI have no other user."""


def root_allowed() -> dict[str, str]:
    """Variables without which mpirun refuses this user: none unless it is root."""
    return dict.fromkeys(ROOT, "1") if os.geteuid() == 0 else {}


@contextmanager
def mpirun_session() -> Iterator[dict[str, str]]:
    """Variables that give one mpirun (Open MPI 5) a new session folder; the folder goes when the context ends.

    By itself mpirun takes TMPDIR/ompi.PID. A killed mpirun leaves that behind, and the next one of the same user that
    the system gives the same process number to ends with 213, "The PMIx server's listener thread failed to start"
    (openpmix issue 4022). Lies in the folder for sessions that the user, or the distlm that started this one, has set;
    where the user has set one for this node and one for the others, gives nothing.
    """
    if any(name in os.environ for name in _APART):
        yield {}
        return
    base = os.environ.get(_BASE)
    if base:
        Path(base).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="distlm-mpirun-", dir=base, ignore_cleanup_errors=True) as folder:
        yield {_BASE: folder}
