"""The doctor's report: a line or a row for each check, and no failure without what to do."""

import ast
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from distlm.runtime.doctor import cluster, machine
from distlm.runtime.doctor.checks import Check, render
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.ranks.mpirun import ROOT, root_allowed
from distlm.runtime.ranks.world import ALONE

CHECKS = [
    Check("python", "ok", "3.11.7"), Check("shm", "warn", "1 MB free", "docker run --shm-size=1g"),
    Check("faiss", "fail", "not installed", "pip install faiss-cpu"),
]  # fmt: skip


def test_a_pipe_gets_one_line_for_each_check() -> None:
    text, healthy = render(CHECKS, as_json=False, launched=False)
    assert not healthy
    assert text.splitlines() == [
        "check   status  found -> what to do",
        "python  ok      3.11.7",
        "shm     warn    1 MB free -> docker run --shm-size=1g",
        "faiss   fail    not installed -> pip install faiss-cpu",
        "1 ok, 1 to look at (warn), 1 to mend (fail)",
    ]


def test_a_terminal_gets_a_table_but_not_that_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    table, _ = render(CHECKS, as_json=False, launched=False)
    table = re.sub(r"\x1b\[[\d;]*m", "", table)
    head, row = (next(line for line in table.splitlines() if word in line) for word in ("check", "faiss"))
    assert head.index("what to do") == row.index("pip install faiss-cpu") and "->" not in table
    assert render(CHECKS, as_json=False, launched=True)[0].startswith("check   status")


def test_json_has_what_to_do() -> None:
    found = json.loads(render(CHECKS, as_json=True, launched=False)[0])
    assert found["checks"][2] == {"name": "faiss", "status": "fail", "text": "not installed",
                                  "mend": "pip install faiss-cpu"}  # fmt: skip


def test_no_check_fails_without_saying_what_to_do() -> None:
    with pytest.raises(ValueError, match="'faiss' fails and does not say what to do"):
        Check("faiss", "fail", "not installed")
    found = 0
    for path in Path(machine.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Check":
                status = node.args[1]
                can_fail = "fail" in ast.unparse(status) or isinstance(status, ast.Name)
                found += can_fail
                assert not can_fail or len(node.args) == 4, f"{path.name}:{node.lineno}: {ast.unparse(node)}"
    assert found > 15


def test_without_faiss_its_line_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_version", lambda name: None)
    (check,) = [check for check in machine._packages(ALONE) if check.name == "faiss"]
    assert check.status == "fail" and check.mend.startswith("pip install ") and "[cpu]" in check.mend


@pytest.mark.parametrize(("shm", "disk"), [(64 << 20, 10 << 30), (65 << 20, 10 << 30), (1 << 30, 1 << 30)])
def test_one_node_and_a_cluster_have_the_same_bounds(
    shm: int, disk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker gives a container 64 MiB of /dev/shm, all of it free at first."""

    def usage(path: str | Path) -> object:
        return shutil._ntuple_diskusage(1 << 40, 0, shm if str(path) == "/dev/shm" else disk)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    alone = {check.name: check for check in machine._disk(ALONE)}
    (room,) = cluster._room(cluster.Cluster(ALONE, SingleComm(), [ALONE], tmp_path))
    few = [name for name, little in (("shm", shm == 64 << 20), ("disk", disk < 5e9)) if little]
    assert [name for name in ("shm", "disk") if alone[name].status == "warn"] == few
    assert room.status == ("warn" if few else "ok")
    assert ("--shm-size" in room.mend, "another folder" in room.mend) == ("shm" in few, "disk" in few)


@pytest.mark.parametrize("given", [(), ROOT[:1], ROOT[1:], ROOT])
def test_root_needs_both_variables_for_mpirun(given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for name in ROOT:
        monkeypatch.delenv(name, raising=False)
    for name in given:
        monkeypatch.setenv(name, "1")
    found = list(machine._root(ALONE))
    assert bool(found) == (given != ROOT) and all(f"{name}=1" in check.mend for check in found for name in ROOT)
    assert root_allowed() == dict.fromkeys(ROOT, "1")


def test_cores_are_those_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(os, "cpu_count", lambda: 80)
    monkeypatch.setattr(machine, "accelerator", lambda: None)
    (found,) = machine._accelerator(ALONE)
    ranks = list(cluster._ranks(cluster.Cluster(ALONE, SingleComm(), [ALONE], tmp_path)))
    assert "3 cores" in found.text and "per rank 3 or more" in ranks[-1].text


def test_no_answer_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a process takes long to start; that is no traceback, and the advice says what to try."""
    monkeypatch.setattr(machine, "ANSWER_S", 0.01)
    (mpi,), (operators,) = machine._mpi(ALONE), machine._deepspeed_ops(ALONE)
    assert (mpi.status, operators.status) == ("fail", "warn")
    for check in (mpi, operators):
        assert "within 0.01 s" in check.text and "run `distlm doctor` again" in check.mend
