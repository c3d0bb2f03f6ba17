"""The collectives do the same over MPI and over torch.distributed, and fail together."""

import sys

import pytest
from support import BIN, ENVIRONMENT, mpirun
from support.deadline import DEADLINE_S

PROGRAM = """
import sys
import numpy as np
from distlm.errors import DistlmError
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.comm import open_comm
from distlm.runtime.ranks.world import resolve_world

world = resolve_world()
comm = open_comm(world)
assert comm.size == 3 and world.source == sys.argv[1], world
comm.PIECE = 1000  # large objects travel in pieces
assert comm.bcast({"from": comm.rank}) == {"from": 0}
assert comm.allgather(comm.rank * 10) == [0, 10, 20]
gathered = comm.gather(np.full(5000 * (1 + comm.rank), comm.rank))
if comm.rank == 0:
    assert [item[0] for item in gathered] == [0, 1, 2] and [len(item) for item in gathered] == [5000, 10000, 15000]
else:
    assert gathered is None
assert len(comm.bcast(b"x" * 5001 if comm.rank == 0 else None)) == 5001
assert comm.any(comm.rank == 2) is True and comm.any(False) is False
comm.barrier()

def fail_on_one():
    if comm.rank == 1:
        raise DistlmError("only rank 1")
for action in (lambda: together(comm, fail_on_one), lambda: rank0_first(comm, lambda: 1 / 1 and fail())):
    def fail():
        raise DistlmError("only rank 1")
    try:
        action()
    except DistlmError as error:
        assert str(error) == "only rank 1" and error.shared
    else:
        raise AssertionError("no error on rank %d" % comm.rank)
assert rank0_first(comm, lambda: comm.rank) == 0
comm.close()
print("fine", comm.rank)
"""


def test_mpi(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM, "utf-8")
    assert mpirun(3, [path, "mpi"]).stdout.count("fine") == 3


def test_torch(tmp_path):
    import subprocess

    path = tmp_path / "program.py"
    path.write_text(PROGRAM, "utf-8")
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node=3", path, "torch"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0 and done.stdout.count("fine") == 3, done.stderr


def test_a_world_that_mpi_does_not_confirm_is_refused():
    code = "from distlm.runtime.ranks.world import World; from distlm.runtime.ranks.comm import open_comm; "
    code += "open_comm(World(1, 4, 1, 4, 'here', 'mpi'))"
    done = mpirun(1, ["-c", code], check=False)
    assert "mpi says rank 1 of 4, MPI says rank 0 of 1" in done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize("code", [1, 75])
def test_an_exit_code_reaches_the_user_through_mpirun(code, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(
        "import sys\nfrom distlm.runtime.ranks.comm import open_comm\n"
        "from distlm.runtime.ranks.world import resolve_world\n"
        f"comm = open_comm(resolve_world())\ncomm.close()\nsys.exit({code})\n", "utf-8",
    )  # fmt: skip
    assert mpirun(2, [path], check=False).returncode == code, sys.executable
