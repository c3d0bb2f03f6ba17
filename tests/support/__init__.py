"""Helpers of many tests: ranks under a real mpirun, tiny token files, tiny configurations."""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import numpy as np

from support import warm
from support.deadline import DEADLINE_S

BIN = Path(sys.executable).parent
TESTS = Path(__file__).parents[1]

# A root user (containers, CI) must allow mpirun by name; the others leave these unread.
ENVIRONMENT = {
    **os.environ,
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_osc": "^ucx",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    # Plans of tests are not those of this machine's earlier runs, and leave nothing behind.
    "DISTLM_SPEEDS": "",
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    # Drivers (support/drivers/) use these helpers, too.
    # The tree comes too: tests/launchers would hide the package of that name, were it not found beside it.
    "PYTHONPATH": os.pathsep.join(
        [str(warm.SITE), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")]), str(TESTS.parent)]
    ),
}


NOBODY = 65534
"""A user and a group without rights."""


def mpirun_command(ranks: int, arguments: Sequence[object]) -> list[str]:
    """`mpirun -n RANKS python ARGUMENTS`; one rank runs without mpirun."""
    command = [sys.executable, *map(str, arguments)]
    if ranks == 1:
        return command
    # Tests kill mpirun; distlm.runtime.ranks.mpirun says what it leaves behind, and what that does to a later one.
    session = ["--prtemca", "prte_tmpdir_base", mkdtemp(dir=_sessions().name)]
    return [str(BIN / "mpirun"), *session, "--oversubscribe", "--bind-to", "none", "-n", str(ranks), *command]


@cache
def _sessions() -> TemporaryDirectory[str]:
    """Session folders of this process's mpiruns; removed when it ends."""
    return TemporaryDirectory(prefix="distlm-tests-mpirun-", ignore_cleanup_errors=True)


def mpirun(
    ranks: int, arguments: Sequence[object], check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` on some ranks and wait; on failure the assertion shows both streams."""
    done = subprocess.run(
        mpirun_command(ranks, arguments),
        env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def distlm(*arguments: str, ranks: int = 1, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the `distlm` command on some ranks."""
    return mpirun(ranks, ["-m", "distlm", *arguments], check=check, **environment)


def write_text(folder: Path, train_lines: int = 400, seed: int = 0, words: int = 60) -> Path:
    """A folder of {train,valid,test}.txt: Zipf-like words in lines of 3 to 20, some lines blank."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, words + 1)
    for split, lines in (("train", train_lines), ("valid", train_lines // 8), ("test", train_lines // 8)):
        rows = []
        for _ in range(lines):
            length = int(random.integers(3, 20)) if random.random() > 0.1 else 0
            chosen = random.choice(words, size=length, p=weights / weights.sum())
            rows.append(" ".join(f"w{i}" for i in chosen))
        (folder / f"{split}.txt").write_text("\n".join(rows) + "\n", "utf-8")
    return folder


TINY = [
    "name=tiny", "model.layers=2", "model.width=32", "model.heads=2", "model.ffn_width=64", "model.cutoffs=[20,40]",
    "model.max_positions=96", "train.tokens_per_sample=64", "train.blocks_per_update=4", "train.micro_blocks=1",
    "train.updates=12", "train.optimizer=adam", "train.schedule=constant", "train.lr=0.002", "train.warmup_updates=2",
    "train.clip_norm=1.0", "train.precision=fp32", "train.deepspeed=zero1", "train.valid_every=6", "train.save_every=4",
    "train.log_every=1", "datastore.context_window=32", "datastore.block=32", "datastore.batch_blocks=4",
    "datastore.rows_per_shard=512", "index.factory=IVF16,PQ4", "index.sample=4096", "knn.context_window=32",
    "knn.block=32", "knn.batch_blocks=4", "knn.blocks_per_unit=8", "knn.k=16", "knn.nprobe=4", "knn.ks=[4,16]",
    "launch.threads=1",
]  # fmt: skip
"""Overrides over the `demo` recipe for a pipeline that takes seconds."""


def succeeds_as_nobody(folder: Path, action: Callable[[], None]) -> bool:
    """Run `action` in a child with no right but everybody's, in `folder`. It is a fork: nothing that torch computes."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # pytest's folders around it are root's alone; what a process has open it may go on from.
            os.chdir(folder)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0
