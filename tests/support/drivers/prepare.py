"""python prepare.py NUMBER RUN_DIR TEXT: prepare, and kill itself before that chunk is written."""

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from distlm.config import DataConfig, RunConfig
from distlm.data import prepare
from distlm.runtime.stage import open_stage


def main(die_at: int, run_dir: str, text: str) -> None:
    prepare.CHUNK = 200
    encode, served = prepare.encode_lines, 0

    def dying(*arguments: Any) -> Iterator[Any]:
        nonlocal served
        for chunk in encode(*arguments):
            served += 1
            if served == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield chunk

    prepare.encode_lines = dying  # type: ignore[assignment]
    config = RunConfig(run_dir=run_dir, data=DataConfig(source="folder", text_dir=text))
    with open_stage("prepare", config) as stage:
        prepare.run_prepare(stage)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
