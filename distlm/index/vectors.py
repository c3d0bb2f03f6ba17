"""Vectors in .npy files."""

from pathlib import Path

import numpy as np

from distlm.errors import DistlmError
from distlm.index.layout import Array
from distlm.system_errors import refuse


def open_vectors(path: Path) -> Array:
    """A .npy file float16 or float32 [n, D], memory-mapped. Raises DistlmError for anything else."""
    try:
        vectors: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        refuse(error, path)
        raise DistlmError(f"{path}: not a readable .npy file ({error})") from error
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32):
        what = f"{vectors.dtype} {vectors.shape}" if isinstance(vectors, np.ndarray) else type(vectors).__name__
        raise DistlmError(f"{path}: holds {what}, expected float16 or float32 [n, D]")
    return vectors
