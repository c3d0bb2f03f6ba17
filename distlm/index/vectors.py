"""Vectors in .npy files."""

from pathlib import Path

import numpy as np

from distlm.errors import DistlmError
from distlm.index.layout import Array
from distlm.runtime.files import load_array
from distlm.system_errors import refuse


def open_vectors(path: Path) -> Array:
    """A .npy file float16 or float32 [n, D], memory-mapped. Raises DistlmError for anything else."""
    try:
        vectors: Array = load_array(path)
    except (OSError, ValueError) as error:
        refuse(error, path)
        raise DistlmError(f"{path}: not a readable .npy file ({error})") from error
    if vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32):
        raise DistlmError(f"{path}: holds {vectors.dtype} {vectors.shape}, expected float16 or float32 [n, D]")
    return vectors
