"""Warm starts: `python -m distlm …` of a test is forked from one process that has imported everything.

Importing torch, DeepSpeed and transformers takes seconds of processor time, and the tests start hundreds of processes.
One server a session (server.py) imports them once and forks a child for each start. The started interpreter
(site/sitecustomize.py) hands its arguments, environment, folder and streams over, passes signals on, and ends as the
child ends; when it is killed, so is the child. mpirun sees no difference.

What is about starting (imports, launchers, processes found by their command line) starts cold: environment COLD.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

VARIABLE = "DISTLM_TESTS_WARM"
"""Environment variable with the server's socket; without it, or when it is empty, a start is an ordinary one."""

COLD = {VARIABLE: ""}
"""Environment of an ordinary start."""

SITE = Path(__file__).with_name("site")
"""First on PYTHONPATH of what tests start: Python imports its sitecustomize.py before anything else."""


class Server:
    """The process that forks; it imports nothing until something is started, and ends when this one does."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment`: that of the starts; of theirs only what is read after the imports may differ."""
        self._folder = TemporaryDirectory(prefix="distlm-tests-warm-")
        address = str(Path(self._folder.name) / "socket")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py")), address],
            env={**environment, **COLD},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.address = address

    def close(self) -> None:
        """End it and wait, so that its processor time counts as this process's."""
        self._process.communicate()
        self._folder.cleanup()
