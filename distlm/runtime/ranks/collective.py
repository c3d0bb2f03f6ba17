"""Failing together: an error on one rank becomes the same error on every rank, so that none waits for ever."""

from collections.abc import Callable
from typing import TypeVar, cast

from distlm.errors import DistlmError
from distlm.runtime.ranks.comm import Comm
from distlm.system_errors import of_system, system_error

T = TypeVar("T")


def rank0_first(comm: Comm, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and hand its result to every rank; its DistlmError is raised on every rank."""
    result: T | None = None
    failure: DistlmError | None = None
    if comm.rank == 0:
        try:
            result = action()
        except DistlmError as error:
            failure = error
        except Exception as error:
            failure = _told(error)
    failure, result = comm.bcast((failure, result))
    if failure is not None:
        failure.shared = True
        raise failure
    return cast(T, result)


def together(comm: Comm, action: Callable[[], T]) -> T:
    """Run `action` on every rank; when it raises DistlmError on any, raise the first rank's on all. Collective."""
    result: T | None = None
    failure: DistlmError | None = None
    try:
        result = action()
    except DistlmError as error:
        failure = error
    except Exception as error:
        failure = _told(error)
    failures = [item for item in comm.allgather(failure) if item is not None]
    if failures:
        failures[0].shared = True
        raise failures[0]
    return cast(T, result)


def _told(error: Exception) -> DistlmError:
    """What the system refused, whichever library says so, as an error for the user. Raises any other again."""
    if not of_system(error):
        raise error
    return system_error(error)
