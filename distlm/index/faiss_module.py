"""The one place that loads faiss, with the command that mends its absence."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from distlm.errors import DistlmError
from distlm.installed import install
from distlm.runtime.files import refuse_no_file

_CPU = ("faiss-cpu",)
_GPU = ("faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu12", "faiss-gpu-cu11")


@cache
def require_faiss() -> Any:
    """The faiss module; its first call sets this rank's thread count from OMP_NUM_THREADS.

    Raises DistlmError when it is not installed, or when its CPU and GPU packages are both installed: they write the
    same files, so which of them works depends on the order of installation.
    """
    both = [name for name in (*_CPU, *_GPU) if _installed(name)]
    if len(both) > 1:
        raise DistlmError(
            f"{' and '.join(both)} are both installed and overwrite each other: "
            f"pip uninstall -y {' '.join(both)}, then {install('cpu')} (or the same with gpu)"
        )
    try:
        import faiss
    except ImportError as error:
        raise DistlmError(f"the index needs faiss: {install('cpu')} (or the same with gpu) ({error})") from error
    faiss.omp_set_num_threads(rank_threads())
    return faiss


@contextmanager
def faiss_threads(count: int) -> Iterator[None]:
    """So many OpenMP threads for faiss in the block, then as before (torch may share the count)."""
    faiss = require_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def write_index(index: Any, path: Path) -> None:
    """Write a faiss file. By Python's writes: faiss prints that its last one failed, and goes on. Raises OSError."""
    faiss = require_faiss()
    # faiss hands over pieces of a few bytes, too.
    with path.open("wb", buffering=1 << 20) as stream:
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))


def rank_threads() -> int:
    """CPU threads of this rank: OMP_NUM_THREADS, else 1."""
    # OpenMP allows a list here, one count per nesting level.
    first = os.environ.get("OMP_NUM_THREADS", "1").split(",")[0]
    return max(1, int(first)) if first.isdigit() else 1


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def require_new(out: Path) -> None:
    """Raises DistlmError where no new index can be written to --out `out`: before any work for it."""
    refuse_no_file(out, "--out")
    # A link that leads nowhere is somebody's, too.
    if os.path.lexists(out):
        raise DistlmError(f"--out {out}: is there already; remove it, or write to another file")
    for_faiss(out)


def for_faiss(path: Path) -> str:
    """A path as faiss takes it. Raises DistlmError for a name that is no UTF-8, which it cannot be given."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DistlmError(f"{ascii(str(path))[1:-1]}: faiss takes no name that is no UTF-8; rename it") from error
    return str(path)
