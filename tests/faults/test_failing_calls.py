"""Any call of the system may fail: a stage says so in one line, and the next start ends as if nothing had been."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from support import distlm, shared
from support.failing import Stages, armed_by, library, read_calls
from support.failing.chains import CHAINS, Step
from support.failing.trial import READS, WORDS, Fault, Kept, Trial, chosen, contents, put_back, table
from support.store import arguments

from distlm.runtime.rundir import code_version

MOST = int(os.environ.get("DISTLM_TEST_FAULTS", "60"))
"""Starts of a stage that are made to fail; where it makes more calls, that many of them, evenly spread."""
KEPT = os.environ.get("DISTLM_TEST_FAULTS_KEPT", "")
"""A folder in which they are kept, below the commit, so that a sweep of hours goes on where it stopped. Nobody may
change the tree meanwhile: run it from a clone of its own, with TMPDIR in memory (/dev/shm) and `--timeout=0`."""
SHARE, SHARES = map(int, os.environ.get("DISTLM_TEST_FAULTS_SHARE", "0/1").split("/"))
"""i/n: every n-th of them alone, from i on; n processes with the same KEPT do all."""

EVERY_KIND = """
import os, sys
from pathlib import Path
import faiss, numpy, safetensors.numpy, shutil
folder = Path(sys.argv[1])
def tried(*actions):
    for action in actions:
        try:
            action()
        except Exception:
            pass
def ahead(name, call, flags=os.O_RDWR | os.O_CREAT):
    with os.fdopen(os.open(folder / name, flags), "r+b") as stream:
        call(stream.fileno())
folder.mkdir()
array = numpy.arange(10000)
os.environ["DISTLM_FAIL_BELOW"] = str(folder)
tried(
    lambda: (folder / "a").write_text("text"), lambda: (folder / "a").read_text(), lambda: list(folder.iterdir()),
    lambda: (folder / "b").mkdir(), lambda: (folder / "a").rename(folder / "c"), lambda: (folder / "c").chmod(0o600),
    lambda: os.link(folder / "c", folder / "d"), lambda: shutil.copyfile(folder / "c", folder / "e"),
    lambda: (folder / "e").unlink(), lambda: numpy.save(folder / "f.npy", array),
    lambda: numpy.load(folder / "f.npy", mmap_mode="r"), lambda: faiss.write_index(faiss.IndexFlatL2(4), f"{folder}/g"),
    lambda: safetensors.numpy.save_file({"a": array}, folder / "h"),
    lambda: ahead("i", os.fsync), lambda: ahead("i", lambda file: os.pwrite(file, b"text", 0)),
    lambda: ahead("i", lambda file: os.writev(file, [b"one", b"two"])), lambda: ahead("i", lambda f: os.pread(f, 4, 0)),
    lambda: ahead("i", lambda file: os.preadv(file, [bytearray(4)], 0)),
    lambda: ahead("i", lambda file: os.ftruncate(file, 9)),
)
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    found = Stages(tmp_path_factory.mktemp("shim"))
    yield found
    found.close()


def test_the_shim_catches_every_kind_of_call(tmp_path: Path) -> None:
    environment = {**os.environ, "LD_PRELOAD": str(library(tmp_path)), "DISTLM_FAIL_LOG": str(tmp_path / "log")}
    below = tmp_path / "files"

    def calls(at: int) -> list[tuple[str, str, Path]]:
        shutil.rmtree(below, ignore_errors=True)
        (tmp_path / "log").unlink(missing_ok=True)
        subprocess.run(
            [sys.executable, "-c", EVERY_KIND, below], env={**environment, "DISTLM_FAIL_AT": str(at)}, check=True
        )
        return read_calls(tmp_path / "log")

    whole = calls(0)
    assert {kind for kind, _, _ in whole} == {
        "write", "pwrite", "writev", "fwrite", "fclose", "fsync", "rename", "open to write", "open to read", "opendir",
        "read", "mmap", "ftruncate", "mkdir", "unlink", "link", "chmod", "sendfile",
    }  # fmt: skip
    assert {error for _, error, _ in whole} == {"-"} and all(path.is_relative_to(below) for _, _, path in whole)
    last = next(number for number, (kind, _, _) in enumerate(whole, 1) if kind == "fclose")
    assert [(kind, path.name) for kind, _, path in calls(last)] == [("fclose", "f.npy")]
    assert (below / "f.npy").stat().st_size < 80000, "what numpy does not notice"


def trials(stages: Stages, chain: str, folder: Path, kept: Kept | None) -> Iterator[Trial]:
    """The stages of a chain, each after an undisturbed start of it."""
    place, before = folder / "place", folder / "before"
    before.mkdir()
    for step in CHAINS[chain](folder, place):
        if kept:
            kept.read()
        trial = Trial(stages, step, place, before, kept)
        trial.undisturbed()
        put_back(place, folder / "after")
        yield trial
        put_back(folder / "after", before)


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_every_call_of_every_stage_may_fail(chain: str, stages: Stages, tmp_path: Path) -> None:
    done = []
    kept = Kept(Path(KEPT) / str(code_version().git), chain) if KEPT else None
    for trial in trials(stages, chain, tmp_path, kept):
        if kept:
            trial.faults += kept.of(trial.step.name)
        known = {fault.number for fault in trial.faults}
        for turn, number in enumerate(chosen(trial.calls, MOST)):
            if number not in known and turn % SHARES == SHARE:
                # A full disk stays full.
                fault = trial.fail(number, stays=turn % 3 == 2)
                if kept:
                    kept.add(fault)
        done.append((chain, trial))
    print(table(done))
    assert [problem for _, trial in done for problem in trial.problems] == []


def test_a_sweep_goes_on(tmp_path: Path) -> None:
    """What two processes have kept is known to a third, but for a line that is torn."""
    faults = [Fault("train", number, "write", "line", number == 2, ["other bytes"]) for number in range(1, 4)]
    (tmp_path / f"plm-{os.getpid()}.jsonl").write_text('{"stage": "train", "num', "utf-8")
    for fault in faults:
        Kept(tmp_path, "plm").add(fault)
    Kept(tmp_path, "plm").add_state("a", ["another byte"])
    (tmp_path / "plm-0.jsonl").write_text('{"stage": "train", "num', "utf-8")
    kept = Kept(tmp_path, "plm")
    assert kept.of("train") == faults and kept.of("datastore write") == [] and kept.states == {"a": ["another byte"]}
    assert not Kept(tmp_path, "awd_lstm").faults


def before_stage(factory: pytest.TempPathFactory, verb: str, folder: Path) -> tuple[Step, Path, Path]:
    """A stage of the tiny run, the folder in which it runs, and what lies there before."""
    place, before = folder / "place", folder / "before"
    source = shared.searched(factory)
    lacks = {"train": "checkpoints", "datastore write": "datastore", "index build": "index", "knn search": "neighbours"}
    shutil.copytree(source.run_dir, before / "run", ignore=shutil.ignore_patterns(*islice(_from(lacks, verb), 9)))
    words = arguments(place / "run", Path(source.data.text_dir), ["train.updates=2", "train.save_every=1"])
    return Step(verb, [*verb.split(), *words]), place, before


def _from(lacks: dict[str, str], verb: str) -> Iterator[str]:
    """What this stage and the later ones make."""
    yield from islice(lacks.values(), [*lacks].index(verb), None)
    yield from ("configs", "config.yaml", "tuned", "results", "losses", "knn.json", "results.json", "states")


@pytest.mark.parametrize("verb", ["index build", "knn search"])
def test_some_calls_of_a_stage_fail(
    verb: str, stages: Stages, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    trial = Trial(stages, *before_stage(tmp_path_factory, verb, tmp_path))
    trial.undisturbed()
    draw = random.Random(1)
    for number in draw.sample(chosen(trial.calls, 40), 2):
        trial.fail(number, stays=draw.random() < 0.3)
    assert trial.problems == [] and [bool(fault.kind) for fault in trial.faults] == [True, True]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("verb", "faults"),
    [
        ("datastore write", 1),
        *(pytest.param(verb, 4, marks=pytest.mark.slow) for verb in ("datastore write", "index build", "train")),
    ],
)
def test_the_disk_of_one_rank_of_two_fails(
    verb: str, faults: int, stages: Stages, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    step, place, before = before_stage(tmp_path_factory, verb, tmp_path)
    log = tmp_path / "log"

    def start(at: int = -1) -> tuple[subprocess.CompletedProcess[str], list[tuple[str, str, Path]]]:
        log.unlink(missing_ok=True)
        armed = armed_by(place, at, log, rank="1") if at >= 0 else {}
        done = distlm(*step.words, ranks=2, check=False, **stages.environment, **armed)
        return done, read_calls(log)

    put_back(before, place)
    whole, calls = start(at=0)
    assert whole.returncode == 0, whole.stderr
    expected = contents(place)
    # Not its signs of life, of which one may fail. In training it writes nothing else.
    of_files = [n for n, (_, _, path) in enumerate(calls, 1) if ".alive" not in path.parts]
    own = [number for number in of_files if calls[number - 1][0] not in READS]
    for number in random.Random(2).sample(own or of_files, faults):
        put_back(before, place)
        done, failed = start(number)
        ((_, error, path),) = failed
        lines = [line for line in done.stderr.splitlines() if "distlm: " in line]
        assert "Traceback" not in done.stderr, done.stderr
        if error != "short":
            assert done.returncode == 1, (path, done.stderr)
            assert any(str(place) in line and WORDS[error] in line for line in lines), (path, done.stderr)
        again, _ = start()
        assert again.returncode == 0, again.stderr
        assert contents(place) == expected
