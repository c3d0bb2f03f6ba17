"""`benchmarks/peers.py`: its table, and that a comparison which fails or takes too long leaves the others theirs."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support import ENVIRONMENT, TESTS
from support.deadline import DEADLINE_S, until

from distlm.analysis.results.page import tables
from distlm.analysis.results.records import ExperimentResults
from distlm.runtime.alive import process_start

FOLDER = TESTS.parent / "benchmarks"
FAKE = """
import json, os, subprocess, sys, time
from pathlib import Path

name, folder = sys.argv[sys.argv.index("--worker") + 1 :]
turn = json.dumps(["small", {"distlm": [200.0, 3.5], "a peer": [100.0, 3.5]}])
print(turn, flush=True)
if name == "knn":
    child = subprocess.Popen(["sleep", "1000000"])
    Path("pids").write_text(f"{os.getpid()} {child.pid}", "utf-8")
    print(turn[:20], end="", flush=True)
    Path("sleeps").touch()
    time.sleep(1000000)
if name == "plm":
    print(turn, flush=True)
sys.exit(name == "lm")
"""


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    """benchmarks/ lies on the path, as when one of them is started."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def a_turn(ours: float, one: float, other: float) -> Any:
    rates = {"distlm": ours, "one": one, "other": other}
    kinds = import_module("peer.turn")
    return kinds.Turn("of 3 words", {name: kinds.Side(rate, rate / 8) for name, rate in rates.items()})


def test_rates_are_medians_and_ratios_are_of_one_turn() -> None:
    parts = import_module("peer.record")
    # A turn beside other work is slow for all: its ratio is one like the others.
    turns = [a_turn(1200, 1000, 800), a_turn(100, 125, 50), a_turn(1100, 1000, 550)]
    found = [parts.Found("A step", turns), parts.Found("Another", [], "exit 1")]
    record = parts.record(found, "python benchmarks/peers.py --quick", ["1 thread"], quick=False)
    (row,) = record.rows
    assert row.ours.text() == "1,100; 1.10 (0.80 to 1.20); 2.00 (1.50 to 2.00); 137.50, 125.00, 68.75"
    assert row.what == "A step: tokens/s; times as fast as one; other; perplexities"
    lines = tables(record).splitlines()
    assert "| A step | one | 1,100 | 1,000 | 1.10 | 0.80 | 1.20 | 137.50 | 125.00 | 3 | of 3 words |" in lines
    assert "| A step | other | 1,100 | 550 | 2.00 | 1.50 | 2.00 | 137.50 | 68.75 | 3 | of 3 words |" in lines
    assert lines[-2] == "Another: exit 1." and lines[-1].startswith("Load at the start ")


def test_what_fails_or_is_ended_leaves_the_others_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts in the place of the comparisons: one hangs with a child, one exits with 1 after a turn, one is right."""
    peers = import_module("peers")
    (tmp_path / "fake.py").write_text(FAKE, "utf-8")
    monkeypatch.setattr(peers, "__file__", str(tmp_path / "fake.py"))
    monkeypatch.chdir(tmp_path)
    plain = peers.process.start

    def start(*words: Any, **how: Any) -> "subprocess.Popen[str]":
        """The limit counts from when the script sleeps or has ended: on a busy machine its start alone takes longer."""
        started: subprocess.Popen[str] = plain(*words, **how)
        until(lambda: started.poll() is not None or Path("sleeps").exists(), "the script")
        return started

    monkeypatch.setattr(peers.process, "start", start)
    with pytest.raises(SystemExit) as end:
        peers.main(["--quick", "--only", "lm,plm,knn", "--limit", "1", "--out", str(tmp_path / "out" / "record.json")])
    assert end.value.code == 1
    record = ExperimentResults.read(tmp_path / "out" / "record.json")
    assert [row.what.split(":")[0] for row in record.rows] == [peers.COMPARISONS[name] for name in ("plm", "knn")]
    assert [cells[-2] for cells in record.tables[0].rows] == [2, 1]
    assert record.notes[-3:-1] == [
        f"{peers.COMPARISONS['lm']}: exit 1.", f"{peers.COMPARISONS['knn']}: ended after 1 s, turns done: 1.",
    ]  # fmt: skip
    assert tables(record) in capsys.readouterr().out
    ended = [int(pid) for pid in (tmp_path / "pids").read_text("utf-8").split()]
    until(lambda: not any(map(process_start, ended)), f"the end of {ended}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--quick", "--only", "knn,lsmt"], r"--only=knn,lsmt: no comparison is called 'lsmt'; there are knn, lstm"),
        (["--quick", "--turns", "0"], r"--turns=0: must be 1 or more"),
        ([], r"--text: must be given, or --quick"),
        (["--text", "here"], r"--text=here: .*here/train\.txt.*; give a folder of train\.txt, valid\.txt"),
    ],
)
def test_what_cannot_be_is_said_before_work(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = import_module("peers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peers, "compare", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as end:
        peers.main(words)
    assert end.value.code == 2 and re.search(said, capsys.readouterr().err)


def test_the_beginning_of_a_text_is_whole_lines(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("a b c\n\nd e\nf g\n", "utf-8")
    made = import_module("shared.text").write_beginning(tmp_path / "text", tmp_path / "part", {"train": 6})
    assert (made / "train.txt").read_text("utf-8") == "a b c\n\nd e\n"


@pytest.mark.slow
def test_all_comparisons_run(tmp_path: Path) -> None:
    """Four processes, of which two train."""
    command = [sys.executable, str(FOLDER / "peers.py"), "--quick", "--threads", "1", "--out", "record.json"]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    record = ExperimentResults.read(tmp_path / "record.json")
    assert [row.what.split(":")[0] for row in record.rows] == [*import_module("peer.turn").COMPARISONS.values()]
    lines = [(str(line[1]), [float(number or 0) for number in line[2:9]]) for line in record.tables[0].rows]
    assert len(lines) == 8 and all(number > 0 for _, numbers in lines for number in numbers)
    # Ours and theirs: other distances give another one, and BERT's first weights are drawn apart.
    for peer, (*_, ours, theirs) in lines:
        if peer != "knn-transformers (no keys)":
            assert ours == pytest.approx(theirs, rel=1e-2 if peer.startswith("transformers") else 1e-3), peer
