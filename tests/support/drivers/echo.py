"""python echo.py exit CODE | read CODE | die | wait: say who and where this process is, then end as told.

`read` reads its standard input first; `wait` ends with 3 at SIGUSR1.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    what = sys.argv[1:]
    about = {
        "arguments": sys.argv, "environment": dict(os.environ), "folder": str(Path.cwd()), "parent": os.getppid(),
        "pid": os.getpid(), "torch": "torch" in sys.modules, "input": sys.stdin.read() if what[0] == "read" else "",
    }  # fmt: skip
    signal.signal(signal.SIGUSR1, lambda _number, _frame: sys.exit(3))
    print(json.dumps(about), flush=True)
    if what == ["die"]:
        os.kill(os.getpid(), signal.SIGTERM)
    while what == ["wait"]:
        time.sleep(0.05)
    sys.exit(int(what[1]))
