"""The keeper of a rank of `distlm deepspeed`: a file system that takes no writes for a while does not end the rank."""

import json
import subprocess
import sys
import threading
from pathlib import Path

from support import ENVIRONMENT, warm
from support.deadline import DEADLINE_S, until

from launchers.hosts.front import Front

KEEPER = """
import socket, sys
from pathlib import Path
from launchers.hosts.rank import Rank

folder = Path(sys.argv[1])
front = {"node": socket.gethostname(), "pid": 1, "started": "unknown"}
keeper = Rank(folder, {"front": front, "lost_after_s": 5.0, "kill_after_s": 1000.0, "cwd": str(folder)}, 0)
keeper.write()
keeper.write_end(keeper.run([sys.executable, "rank.py"], None))
"""

RANK = """
import os, resource, subprocess, sys, time
from pathlib import Path

keeper = os.getppid()
_, hard = resource.prlimit(keeper, resource.RLIMIT_FSIZE)
resource.prlimit(keeper, resource.RLIMIT_FSIZE, (0, hard))
# More than a pipe holds.
sys.stdout.write("x" * 300_000)
while Path("rank-00000.json").read_text():
    time.sleep(0.05)
resource.prlimit(keeper, resource.RLIMIT_FSIZE, (hard, hard))
print("the rank goes on", flush=True)
while not Path("rank-00000.json").read_text() or "the rank goes on" not in Path("rank-00000.log").read_text():
    time.sleep(0.05)
# The end cannot be written at first, either.
resource.prlimit(keeper, resource.RLIMIT_FSIZE, (0, hard))
later = f"import resource, time; time.sleep(1); resource.prlimit({keeper}, resource.RLIMIT_FSIZE, ({hard}, {hard}))"
subprocess.Popen([sys.executable, "-c", later], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
sys.exit(7)
"""


def test_a_keeper_whose_files_cannot_be_written_for_a_while_keeps_its_rank(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK, "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", KEEPER, str(tmp_path)],
        env={**ENVIRONMENT, **warm.COLD},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("x") == 300_000 and "the rank goes on" in done.stdout
    assert json.loads((tmp_path / "rank-00000.json").read_text("utf-8"))["code"] == 7


def test_an_order_that_cannot_be_written_is_given_with_the_next_beat(tmp_path: Path) -> None:
    folder = tmp_path / "start"
    front = Front(folder, {0: "here"}, "ssh", 0.3, 1.0, 1.0)
    front._give("stop")
    folder.mkdir()
    beat = threading.Thread(target=front._beat)
    beat.start()
    until((folder / "order.json").is_file)
    front._ended.set()
    beat.join()
    assert json.loads((folder / "order.json").read_text("utf-8"))["order"] == "stop"
