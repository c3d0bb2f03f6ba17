"""launch.share: independent processes write shares of one store; the run after them completes it."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import ENVIRONMENT, distlm
from support.deadline import DEADLINE_S, until
from support.store import arguments, file_hashes

from distlm.config.schema import RunConfig
from distlm.datastore.reader import Datastore
from distlm.datastore.verify import verify_datastore
from distlm.datastore.writer import StoreSummary, run_datastore_write
from distlm.errors import DistlmError
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import open_stage


def write(config: RunConfig, share: str = "") -> StoreSummary:
    with open_stage("datastore", replace(config, launch=replace(config.launch, share=share))) as stage:
        return run_datastore_write(stage)


def folder_of(config: RunConfig) -> Path:
    return RunDir.of(config).datastore


def finished_shards(config: RunConfig) -> list[int]:
    return sorted(int(path.name.split("-")[1].split(".")[0]) for path in folder_of(config).glob(".shard-*.json"))


def test_shares_then_a_run_leave_the_bytes_of_one_run(ready: RunConfig, finished: RunConfig) -> None:
    shards = len(Datastore.open(folder_of(finished)).shards)
    assert write(ready, "1/3")["shards"] == len(range(1, shards, 3))
    assert finished_shards(ready) == list(range(1, shards, 3))
    with pytest.raises(DistlmError, match="unfinished"):
        Datastore.open(folder_of(ready))
    write(ready, "0/3")
    assert write(ready, "1/3")["rows_written"] == 0
    # Share 2/3 never ran: the run does its shards and no others.
    left = Datastore.open(folder_of(finished)).shards[2::3]
    assert write(ready)["rows_written"] == sum(shard.rows for shard in left)
    assert file_hashes(folder_of(ready)) == file_hashes(folder_of(finished))
    # A share that comes late finds nothing to do.
    assert write(ready, "0/3")["rows_written"] == 0
    assert verify_datastore(folder_of(ready)) == []


def test_a_share_leaves_damage_to_a_run(store_copy: RunConfig, finished: RunConfig) -> None:
    (folder_of(store_copy) / "keys-00002.npy").write_bytes(b"")
    with pytest.raises(DistlmError, match=r"shards \[2\] are damaged; run the same command without launch.share"):
        write(store_copy, "0/2")
    write(store_copy)
    assert file_hashes(folder_of(store_copy)) == file_hashes(folder_of(finished))


def test_temporary_files_of_another_share_stay(ready: RunConfig) -> None:
    write(ready, "0/2")
    theirs, own = (folder_of(ready) / f".keys-0000{shard}.npy.node7.9.tmp" for shard in (1, 2))
    theirs.touch()
    own.touch()
    write(ready, "0/2")
    assert theirs.exists() and not own.exists()
    write(ready)
    assert not theirs.exists()


@pytest.mark.multiprocess
def test_two_shares_at_once_one_killed_and_started_again(ready: RunConfig, finished: RunConfig) -> None:
    words = arguments(Path(ready.run_dir), Path(ready.data.text_dir))

    def start(share: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "distlm", "datastore", "write", *words, f"launch.share={share}"]
        return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    shutil.rmtree(folder_of(ready), ignore_errors=True)
    first, second = start("0/2"), start("1/2")
    until(lambda: second.poll() is not None or any(shard % 2 for shard in finished_shards(ready)), "a shard")
    os.kill(second.pid, signal.SIGKILL)
    assert second.wait(DEADLINE_S) in (-signal.SIGKILL, 0)
    assert start("1/2").wait(DEADLINE_S) == 0
    assert first.wait(DEADLINE_S) == 0
    assert " 0 shards to write" in distlm("datastore", "write", *words).stderr
    assert file_hashes(folder_of(ready)) == file_hashes(folder_of(finished))


@pytest.mark.multiprocess
def test_a_share_on_two_ranks_is_refused(ready: RunConfig) -> None:
    words = arguments(Path(ready.run_dir), Path(ready.data.text_dir))
    done = distlm("datastore", "write", *words, "launch.share=0/2", ranks=2, check=False)
    assert done.returncode == 2
    assert done.stderr.count("a share is one process, and this step has 2 ranks") == 1
    assert not folder_of(ready).exists()
