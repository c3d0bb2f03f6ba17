"""python lock.py FOLDER [K/N]: hold a folder's lock (a share's) until standard input ends."""

import sys
from pathlib import Path

from distlm.errors import DistlmError
from distlm.runtime.lock import only_writer
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.ranks.share import Share

if __name__ == "__main__":
    share = Share(*map(int, sys.argv[2].split("/"))) if sys.argv[2:] else None
    try:
        with only_writer(Path(sys.argv[1]), SingleComm(), "writing", share):
            print("held", flush=True)
            sys.stdin.read()
    except DistlmError as error:
        print(error, flush=True)
        sys.exit(1)
