"""python lock_race.py FOLDER PROCESSES ROUNDS: processes that all want a folder's lock, again and again; prints how
often two had it at once, and how often one had it."""

import os
import sys
import time
from pathlib import Path

from distlm.errors import Busy
from distlm.runtime import lock
from distlm.runtime.ranks.comm import SingleComm

if __name__ == "__main__":
    folder, processes, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    lock._PATIENCE_S = 0.0
    inside, log = folder / "inside", folder / "log"
    children = []
    for _ in range(processes):
        child = os.fork()
        if child == 0:
            for _ in range(rounds):
                while True:
                    try:
                        with lock.only_writer(folder, SingleComm(), "racing"):
                            try:
                                inside.mkdir()
                            except FileExistsError:
                                log.open("a").write("two\n")
                            time.sleep(0.003)
                            inside.rmdir()
                            log.open("a").write("one\n")
                        break
                    except Busy:
                        time.sleep(0.002)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    lines = log.read_text().splitlines()
    print(lines.count("two"), lines.count("one"))
