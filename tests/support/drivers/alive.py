"""A rank that watches the other of two for four seconds of work: FOLDER RANK."""

import sys
import time
from pathlib import Path

from distlm.runtime.alive import Watch
from distlm.runtime.ranks.world import World

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(exist_ok=True)
watch = Watch(folder, World(rank, 2, rank, 2, "here", "slurm"), 5)
watch.beat()
assert watch.wait_for_files([1 - rank]) == []
watch.start()
Path(f"{folder}-{rank}").touch()
for _ in range(40):
    time.sleep(0.1)
watch.stop()
