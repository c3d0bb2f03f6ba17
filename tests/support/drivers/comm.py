"""python comm.py SOURCE: the collectives of three ranks, whose world comes from SOURCE."""

import sys

import numpy as np

from distlm.errors import DistlmError
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.ranks.comm import MpiComm, open_comm
from distlm.runtime.ranks.world import resolve_world


def main() -> None:
    world = resolve_world()
    comm = open_comm(world)
    assert comm.size == 3 and world.source == sys.argv[1], world
    if isinstance(comm, MpiComm):
        comm.PIECE = 1000  # large objects travel in pieces
    assert comm.bcast({"from": comm.rank}) == {"from": 0}
    assert comm.allgather(comm.rank * 10) == [0, 10, 20]
    gathered = comm.gather(np.full(5000 * (1 + comm.rank), comm.rank))
    if comm.rank == 0:
        assert gathered is not None
        assert [item[0] for item in gathered] == [0, 1, 2] and [len(item) for item in gathered] == [5000, 10000, 15000]
    else:
        assert gathered is None
    assert len(comm.bcast(b"x" * 5001 if comm.rank == 0 else None)) == 5001
    exchanged = comm.alltoall([np.full(100 + rank, 10 * comm.rank + rank) for rank in range(3)])
    assert [(len(item), item[0]) for item in exchanged] == [
        (100 + comm.rank, 10 * rank + comm.rank) for rank in range(3)
    ]
    assert comm.any(comm.rank == 2) is True and comm.any(False) is False
    comm.barrier()

    def fail() -> None:
        raise DistlmError("only rank 1")

    def fail_on_one() -> None:
        if comm.rank == 1:
            fail()

    for action in (lambda: together(comm, fail_on_one), lambda: rank0_first(comm, fail)):
        try:
            action()
        except DistlmError as error:
            assert str(error) == "only rank 1" and error.shared
        else:
            raise AssertionError(f"no error on rank {comm.rank}")
    assert rank0_first(comm, lambda: comm.rank) == 0
    comm.close()
    print("fine", comm.rank)


if __name__ == "__main__":
    main()
