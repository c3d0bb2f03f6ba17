"""The collectives do the same over MPI and over torch.distributed, and fail together."""

import subprocess
import sys

import pytest
from support import BIN, ENVIRONMENT, mpirun
from support.deadline import DEADLINE_S
from support.drivers import comm as driver


def test_mpi():
    assert mpirun(3, [driver.__file__, "mpi"]).stdout.count("fine") == 3


def test_torch():
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=3", driver.__file__, "torch"]
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
