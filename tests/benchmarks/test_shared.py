"""What the benchmarks measure with: a process's own peak, the machine, kills, and plans that know of no other run."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support import ENVIRONMENT, TESTS

from distlm.config import load_config
from distlm.runtime import speeds
from distlm.runtime.records import SpeedsFile

FOLDER = TESTS.parent / "benchmarks"
HELD = 300 << 20


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    """benchmarks/ lies on the path, as when one of them is started."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def test_a_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    held = b"\1" * HELD
    code = "from shared.clock import own_peak; print(own_peak())"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, env=ENVIRONMENT, capture_output=True, check=True)
    assert 1 << 20 < int(done.stdout) < len(held)
    assert import_module("shared.clock").own_peak() > len(held)


def test_a_record_names_the_machine(tmp_path: Path) -> None:
    machine = import_module("shared.machine")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f\nbugs\t\t: avx512_vnni\n", "utf-8")
    found = machine.described(cpuinfo)
    assert found["machine"] == speeds.machine() and found["avx512"] is True and found["int8"] is False
    assert len(found["load"]) == 3 and "commit" in found
    # Not known is not no.
    assert machine.described(tmp_path / "none")["avx512"] is None
    assert machine.in_words().startswith("Load at the start ")


def test_a_stage_that_is_over_before_every_kill_says_nothing_of_its_bytes(tmp_path: Path) -> None:
    full_rows = import_module("full_rows")
    config, log = load_config("demo", [f"run_dir={tmp_path / 'run'}"]), tmp_path / "log"
    # No rank of distlm: none is found that could be killed.
    command = [sys.executable, "-c", "print('over')"]
    found = full_rows.disturbed("index merge", command, config, 1000.0, random.Random(0), log)
    assert found == {"killed": False, "over_before": full_rows.KILLS, "same_bytes": None}
    assert log.read_text("utf-8").split() == ["over"] * full_rows.KILLS


def test_a_rank_is_killed_at_its_moment(tmp_path: Path) -> None:
    watched = import_module("shared.watched")
    config = load_config("demo", [f"run_dir={tmp_path / 'run'}"])
    # A package of that name which only waits: the kill finds a rank by its command line.
    (tmp_path / "distlm.py").write_text("import time\ntime.sleep(1000000)\n", "utf-8")
    command = ["env", "-C", str(tmp_path), "PYTHONPATH=", sys.executable, "-m", "distlm"]
    ran = watched.watched(command, config, tmp_path / "log", 0.5, random.Random(0))
    assert ran.killed and ran.code != 0 and ran.seconds - ran.noticed_s >= 0.5
    (resident,), (own,) = ran.resident.values(), ran.own.values()
    assert resident > own > 0


def test_plans_of_all_rows_know_of_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_rows, path = import_module("full_rows"), tmp_path / "speeds.json"
    monkeypatch.setenv(speeds.VARIABLE, str(tmp_path / "of_the_user.json"))
    full_rows.use_speeds(tmp_path)
    kept = SpeedsFile.read(path)
    assert kept.stages == [] and kept.flops[speeds.machine()] > 0
    assert speeds.kept_flops() == kept.flops[speeds.machine()]
    assert not (tmp_path / "of_the_user.json").exists()
    SpeedsFile(stages=[], flops={speeds.machine(): 1.0}).write(path)
    full_rows.use_speeds(tmp_path)
    assert speeds.kept_flops() == 1.0


def test_a_disk_that_is_too_small_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"the text needs 10000\.00 TB .* free; free .*, or give another --folder"):
        import_module("full_rows").require_disk(tmp_path, 10**16, "the text")


def units(folder: Path, *words: str) -> Any:
    command = [
        sys.executable,
        str(FOLDER / "units.py"),
        "--quick",
        "--stages",
        "write",
        "--folder",
        str(folder),
        *words,
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


@pytest.mark.slow
def test_a_turn_that_was_ended_early_is_done_anew(tmp_path: Path) -> None:
    whole = units(tmp_path)
    turn = tmp_path / "write-2-0"
    turn.with_suffix(".json").unlink()
    # The stage would go on with what a kill left there, and refuse this.
    turn.mkdir()
    (turn / "keys-00000.npy").write_bytes(b"half")
    again = units(tmp_path)
    assert again["write"]["seconds"]["1"] == whole["write"]["seconds"]["1"]
    assert sorted(path.name for path in tmp_path.glob("write-*")) == ["write-1-0.json", "write-2-0.json"]
    assert "of other options; give them again" in units(tmp_path, "--width", "16")
