"""Python in a process that has no distlm: importing it fails, and nothing of this checkout is on the path."""

import subprocess
import sys
from pathlib import Path

from support.deadline import DEADLINE_S

REFUSE = """
import sys

class NoDistlm:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("distlm", "launchers"):
            raise ImportError(f"{name}: this process has no distlm")

sys.meta_path.insert(0, NoDistlm())
try:
    import distlm
except ImportError:
    pass
else:
    raise SystemExit("distlm can be imported")
"""


def without_distlm(script: str, *arguments: object, home: Path, **environment: str) -> str:
    """Standard output of a script; `home`: where transformers keeps copies of the code that it loads."""
    kept = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        # -I: neither PYTHONPATH nor the folder that it is started in.
        [sys.executable, "-I", "-c", REFUSE + script, *map(str, arguments)],
        cwd=home, env=kept | environment, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
